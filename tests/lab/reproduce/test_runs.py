"""Runs are done once, within the budget, resumed and shared; a stored result is checked."""

from dataclasses import replace
from pathlib import Path

import pytest
from claim_runs import CLAIM, Process, Quiet, page_text, store, write_run

from equipoise.errors import EquipoiseError
from equipoise_lab.records import Run, read_json, write_json
from equipoise_lab.reproduce.command import as_json
from equipoise_lab.reproduce.jobs import Job, key_of
from equipoise_lab.reproduce.made_with import MadeWith
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.runs import execute
from equipoise_lab.reproduce.verdict import findings


@pytest.fixture(autouse=True)
def _no_process_started():
    Process.started, Process.running, Process.most_running = [], 0, 0


def test_missing_runs_are_done_once_side_by_side_and_their_folders_removed(tmp_path):
    results, quiet = Results(tmp_path / "results"), Quiet()
    jobs = [*CLAIM.jobs(), *CLAIM.jobs()]  # claims share runs
    assert execute(jobs, results, tmp_path / "work", quiet, workers=2, start=Process)
    assert len(Process.started) == 8 and Process.most_running == 2
    assert list((tmp_path / "work").iterdir()) == []
    assert quiet.shown[0] == (0, 8, None) and quiet.shown[-1] == (8, 8, 0.0)
    seconds_left = [seconds for _, _, seconds in quiet.shown[1:-1]]
    assert all(0 <= seconds <= 4 * 20 for seconds in seconds_left) and seconds_left[0] > 5, (
        "five seconds of steps, at most fifteen outside them, two runs at a time"
    )
    stored = results.get(CLAIM.job("a", 0))
    assert stored["result"]["val_nats"] == 5.0 and stored["seconds"] == 5.0 and stored["domains"] == {"law": 4.0}
    assert sum(file.stat().st_size for file in results.folder.iterdir()) < 8 * 5000
    assert execute(jobs, results, tmp_path / "work", Quiet(), workers=2, start=Process)
    assert len(Process.started) == 8  # no run is done again


def test_no_run_starts_that_would_not_end_within_the_budget(tmp_path):
    results, quiet = Results(tmp_path / "results"), Quiet()
    store(results, CLAIM.job("a", 0), 5.0, seconds=50.0)
    assert not execute(CLAIM.jobs(), results, tmp_path / "work", quiet, workers=1, minutes=0.5, start=Process)
    assert Process.started == []
    assert execute(CLAIM.jobs(), results, tmp_path / "work", quiet, workers=1, minutes=60, start=Process)


def test_a_run_in_another_precision_is_another_run(tmp_path):
    folder, jobs = tmp_path / "results", CLAIM.jobs()
    named, other = Results(folder), Results(folder, dtype="float32")
    store(named, jobs[0], 5.0, seconds=50.0)
    assert named.missing(jobs) == jobs[1:] and other.missing(jobs) == jobs
    quiet = Quiet()
    assert execute(jobs, other, tmp_path / "work", quiet, workers=1, minutes=0.5, start=Process)
    assert quiet.shown[0] == (0, 8, None), "times in bfloat16 must not be used for float32"
    assert all(arguments[arguments.index("--dtype") + 1] == "float32" for arguments in Process.started)
    assert len(Process.started) == 8 and len(list(folder.iterdir())) == 9
    assert other.get(jobs[0])["options"]["dtype"] == "float32" and other.missing(jobs) == []
    assert named.get(jobs[0])["result"]["val_nats"] == 5.0 and named.missing(jobs) == jobs[1:]
    assert "--dtype float32" in page_text([CLAIM], findings([CLAIM], other), other)
    assert "--dtype float32" not in page_text([CLAIM], findings([CLAIM], named), named)
    assert "--dtype float32" in page_text([replace(CLAIM, dtype="float32")], [], named)
    means = findings([CLAIM], other)[0].means
    assert means == {"b": 5.0, "a": 5.0} and findings([CLAIM], named)[0].estimate is None


def test_every_stored_result_has_the_precision_of_its_options():
    for file in (Path(__file__).parents[3] / "benchmarks" / "results" / "claims" / "first").iterdir():
        stored = read_json(file)
        assert stored["hardware"].endswith(f", {stored['options']['dtype']}"), file


def test_a_failed_run_is_reported_with_its_last_line_and_finished_runs_are_kept(tmp_path):
    results = Results(tmp_path / "results")

    def second_fails(command, **options):
        return Process(command, **options, code=int(len(Process.started) == 1))

    with pytest.raises(EquipoiseError, match="exited with 1. Its last line was: equipoise: error: no text"):
        execute(CLAIM.jobs(), results, tmp_path / "work", Quiet(), workers=1, start=second_fails)
    assert len(results.missing(CLAIM.jobs())) == 7


def test_an_exception_in_a_worker_reaches_the_caller(tmp_path):
    class Full(Results):
        def put(self, job, run, made_with):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        execute(CLAIM.jobs(), Full(tmp_path / "results"), tmp_path / "work", Quiet(), workers=2, start=Process)


def test_a_run_that_another_process_does_meanwhile_is_not_done_again(tmp_path):
    results = Results(tmp_path / "results")
    jobs = CLAIM.jobs()

    def start(command, **options):
        if not Process.started:
            store(results, jobs[1], 5.0)
        return Process(command, **options)

    assert execute(jobs, results, tmp_path / "work", Quiet(), workers=1, start=start)
    assert len(Process.started) == len(jobs) - 1


def test_a_run_that_diverges_is_stored_and_its_seed_left_out(tmp_path):
    results = Results(tmp_path / "results")

    def third_diverges(command, **options):
        number = len(Process.started)
        process = Process(command, **options)
        if number == 2:
            folder = Path(process.arguments[process.arguments.index("--out") + 1])
            write_run(folder)
            (folder / "result.json").unlink()
            (folder / "steps.jsonl").write_text(
                '{"step":1,"seconds":2.0,"loss":7.5}\n{"step":2,"seconds":3.0,"loss":null}\n'
            )
            process.code = 1
        return process

    assert execute(CLAIM.jobs(), results, tmp_path / "work", Quiet(), workers=1, start=third_diverges)
    assert len(Process.started) == 8 and list((tmp_path / "work").iterdir()) == []
    assert results.get(CLAIM.jobs()[2])["result"] == {"diverged": 2}
    (first, _) = findings([CLAIM], results)
    assert first.estimate.n == 3 and first.diverged == 1
    assert "3 of 4 seeds, 1 diverged" in page_text([CLAIM], [first], results)
    assert as_json([first])[0]["diverged"] == 1


def test_an_evaluation_without_a_number_is_stored(tmp_path):
    write_run(tmp_path / "run")
    write_json(tmp_path / "run" / "result.json", {"val_nats": None, "domains": {"law": {"nats": None}}})
    results = Results(tmp_path / "results")
    results.put(CLAIM.job("a", 0), Run(tmp_path / "run"), MadeWith("c", "x"))
    stored = results.get(CLAIM.job("a", 0))
    assert stored["result"] == {"val_nats": None} and stored["domains"] == {"law": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON: .* To run it again, remove it"),
        ("[]", "must contain a record in the right form"),
        ("{}", "must contain options"),
        ('{"options": {}, "result": null}', "must contain result in the right form"),
        ('{"options": {}, "result": {"val_nats": "1"}}', "must contain result .*val_nats must be a number"),
        ('{"options": {}, "result": {}, "seconds": null}', "must contain seconds in the right form"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, text, message):
    path = tmp_path / f"{key_of(CLAIM.job('a', 0))}.json"
    path.write_text(text)
    with pytest.raises(EquipoiseError, match=f"{path.name} {message}"):
        Results(tmp_path).get(CLAIM.job("a", 0))


def test_a_result_of_other_options_is_refused(tmp_path):
    results = Results(tmp_path)
    store(results, CLAIM.job("a", 0), 5.0)
    (tmp_path / f"{key_of(CLAIM.job('a', 0))}.json").rename(tmp_path / f"{key_of(CLAIM.job('b', 0))}.json")
    with pytest.raises(
        EquipoiseError, match="must hold the result of the options and of the recipe that its name stands for"
    ):
        results.get(CLAIM.job("b", 0))


def test_the_key_of_a_run_depends_on_its_options_alone():
    assert key_of(Job((("a", 1), ("b", 2)))) != key_of(Job((("a", 1), ("b", 3))))
    assert CLAIM.job("a", 0) == CLAIM.job("a", 0) and key_of(CLAIM.job("a", 0)) != key_of(CLAIM.job("a", 1))
