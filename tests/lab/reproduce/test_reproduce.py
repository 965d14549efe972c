"""Runs are done once, within the budget, resumed and shared; verdicts come from stored results alone."""

import json
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from editions import any_claim

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.analysis import detectable_effect
from equipoise_lab.cli import main
from equipoise_lab.records import Run, read_json, write_json
from equipoise_lab.reproduce import command
from equipoise_lab.reproduce.arms import Choice
from equipoise_lab.reproduce.claim import parse_claim
from equipoise_lab.reproduce.command import as_json, reproduce, table_rows
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.edition import load_edition
from equipoise_lab.reproduce.jobs import Job, key_of
from equipoise_lab.reproduce.made_with import MadeWith
from equipoise_lab.reproduce.page import figure_of, pages, write
from equipoise_lab.reproduce.page.wording import verdict_text
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.runs import execute
from equipoise_lab.reproduce.verdict import MARGIN_OF, findings
from equipoise_lab.train import engine
from equipoise_lab.train.config import Train

FIRST, ANY = load_edition("first"), any_claim()  # ANY: its pages take claims of any name
LEADERBOARD = FIRST.page.leaderboard
CHOICE = Choice("0.01", {"strategy": "none"})
CLAIM = parse_claim(
    "x",
    {
        "title": "a is lower than b",
        "source": "somewhere",
        "paper": "a 1, b 2",
        "size": "small",
        "seeds": 4,
        "arms": {"a": {"strategy": "none"}, "b": {"strategy": "loss-free"}},
        "primary": {"statistic": "val_nats", "of": "a", "against": "b", "claim": "lower"},
        "also": [{"statistic": "val_nats", "over": {"a": 1, "b": 2}, "claim": "higher"}],
    },
    FIRST.sizes,
    "first",
)


class Quiet:
    """Progress that prints nothing and keeps what it was shown."""

    def __init__(self):
        self.lines, self.shown = [], []

    def say(self, text):
        self.lines.append(text)

    def done(self, number, total, seconds_left):
        self.shown.append((number, total, seconds_left))


def _text(claims, findings, results):
    """All pages, one after the other."""
    return "\n".join(pages("results.md", ANY, claims, findings, results).values())


def _store(results, job, value, seconds=10.0):
    results.folder.mkdir(parents=True, exist_ok=True)
    content = {"options": dict(job.options), "result": {"val_nats": value}, "seconds": seconds}
    content |= {"began": "2026-01-02T03:04", "hardware": "2 CPU cores", "versions": {"torch": "2"}}
    write_json(results.folder / f"{key_of(job)}.json", content)


def _fill(results, differences):
    for seed, difference in enumerate(differences):
        _store(results, CLAIM.job("a", seed), 5.0 + seed + difference)
        _store(results, CLAIM.job("b", seed), 5.0 + seed)


class Process:
    """A stand-in for `equipoise train` that writes the folder of a run."""

    started, running, most_running = [], 0, 0
    lock = threading.Lock()

    def __init__(self, command, stdout, stderr, env, code=0):
        assert env["OMP_NUM_THREADS"] == "1" and command[1:4] == ["-m", "equipoise", "train"]
        self.arguments, self.stdout, self.code = command[4:], stdout, code
        Process.started.append(self.arguments)

    def wait(self):
        with Process.lock:
            Process.running += 1
            Process.most_running = max(Process.most_running, Process.running)
        time.sleep(0.05)
        with Process.lock:
            Process.running -= 1
        folder = self.arguments[self.arguments.index("--out") + 1]
        if self.code:
            self.stdout.write(b"an earlier line\nequipoise: error: no text\n")
            return self.code
        _write_run(folder)
        return 0

    def send_signal(self, number):
        pass


def _write_run(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    write_json(
        folder / "config.json",
        {"format": 1, "began": "2026-01-02", "device": "cpu", "dtype": "bfloat16", "versions": {"torch": "2"}},
    )
    (folder / "steps.jsonl").write_text('{"step":1,"seconds":2.0}\n{"step":2,"seconds":3.0}\n')
    write_json(folder / "result.json", {"val_nats": 5.0, "domains": {"law": {"nats": 4.0, "bits_per_byte": 1.0}}})


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
    _store(results, CLAIM.job("a", 0), 5.0, seconds=50.0)
    assert not execute(CLAIM.jobs(), results, tmp_path / "work", quiet, workers=1, minutes=0.5, start=Process)
    assert Process.started == []
    assert execute(CLAIM.jobs(), results, tmp_path / "work", quiet, workers=1, minutes=60, start=Process)


def test_a_run_in_another_precision_is_another_run(tmp_path):
    folder, jobs = tmp_path / "results", CLAIM.jobs()
    named, other = Results(folder), Results(folder, dtype="float32")
    _store(named, jobs[0], 5.0, seconds=50.0)
    assert named.missing(jobs) == jobs[1:] and other.missing(jobs) == jobs
    quiet = Quiet()
    assert execute(jobs, other, tmp_path / "work", quiet, workers=1, minutes=0.5, start=Process)
    assert quiet.shown[0] == (0, 8, None), "times in bfloat16 must not be used for float32"
    assert all(arguments[arguments.index("--dtype") + 1] == "float32" for arguments in Process.started)
    assert len(Process.started) == 8 and len(list(folder.iterdir())) == 9
    assert other.get(jobs[0])["options"]["dtype"] == "float32" and other.missing(jobs) == []
    assert named.get(jobs[0])["result"]["val_nats"] == 5.0 and named.missing(jobs) == jobs[1:]
    assert "--dtype float32" in _text([CLAIM], findings([CLAIM], other), other)
    assert "--dtype float32" not in _text([CLAIM], findings([CLAIM], named), named)
    assert "--dtype float32" in _text([replace(CLAIM, dtype="float32")], [], named)
    means = findings([CLAIM], other)[0].means
    assert means == {"b": 5.0, "a": 5.0} and findings([CLAIM], named)[0].estimate is None


def test_every_stored_result_has_the_precision_of_its_options():
    for file in (Path(__file__).parents[3] / "benchmarks" / "results" / "claims" / "first").iterdir():
        stored = read_json(file)
        assert stored["hardware"].endswith(f", {stored['options']['dtype']}"), file


@pytest.mark.parametrize(
    ("options", "has_bfloat16", "is_warned"),
    [((), False, True), ((), True, False), (("--budget", "0"), False, False), (("--dtype", "float32"), False, False)],
)
def test_a_machine_without_bfloat16_warns_before_runs_start(monkeypatch, capsys, options, has_bfloat16, is_warned):
    calls = []
    monkeypatch.setattr(engine, "machine", lambda dtype: ("cpu", has_bfloat16))
    monkeypatch.setattr(command, "reproduce", lambda options, progress: calls.append(options) or [])
    main(["reproduce", "1-scope", "--edition", "first", *options])
    assert ("--dtype float32" in capsys.readouterr().err.replace("\n", " ")) == is_warned
    assert calls[0].dtype == ("float32" if "--dtype" in options else None)


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
            _store(results, jobs[1], 5.0)
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
            _write_run(folder)
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
    assert "3 of 4 seeds, 1 diverged" in _text([CLAIM], [first], results)
    assert as_json([first])[0]["diverged"] == 1


def test_a_result_without_a_loss_is_left_out_too(tmp_path):
    claim, results = replace(CLAIM, name=LEADERBOARD), Results(tmp_path)
    _fill(results, [-0.1, -0.1, -0.1, -0.1])
    _store(results, CLAIM.job("a", 1), None)
    (first, _) = findings([CLAIM], results)
    assert first.estimate.n == 3 and first.diverged == 0
    assert "This comparison has no results yet" in _text([claim], findings([claim], results), results)


def test_an_evaluation_without_a_number_is_stored(tmp_path):
    _write_run(tmp_path / "run")
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


def test_a_verdict_before_the_last_seed_says_so(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.1, -0.11, -0.09])
    (first, _) = findings([CLAIM], results)
    assert verdict_text(first) == "supported so far"
    _fill(results, [-0.1, -0.11, -0.09, -0.1])
    assert verdict_text(findings([CLAIM], results)[0]) == "supported"
    far = replace(CLAIM, primary=replace(CLAIM.primary, claim="equal", margin=0.01))
    assert verdict_text(findings([far], results)[0]) == "not supported: a is lower"
    near = replace(CLAIM, primary=replace(CLAIM.primary, claim="equal", margin=0.099))
    assert verdict_text(findings([near], results)[0]) == "undecided; the mean is beyond the margin"


def test_two_seeds_give_no_estimate_of_how_many_are_needed(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.1, 0.09])
    assert verdict_text(findings([CLAIM], results)[0]) == "undecided"


@pytest.mark.parametrize(("differences", "is_known"), [((-0.3, -0.31, -0.29), True), ((-0.3, 0.2, 0.01), False)])
def test_the_margin_of_equality_needs_an_interval_that_excludes_zero(tmp_path, differences, is_known):
    results, scope = Results(tmp_path), replace(CLAIM, name=MARGIN_OF)
    _fill(results, differences)
    equal = replace(CLAIM, primary=replace(CLAIM.primary, claim="equal"))
    finding = findings([scope, equal], results)[2]
    assert finding.claim is equal and finding.margin == (pytest.approx(0.1) if is_known else None)
    assert (finding.judgement is None) != is_known


def test_a_result_of_other_options_is_refused(tmp_path):
    results = Results(tmp_path)
    _store(results, CLAIM.job("a", 0), 5.0)
    (tmp_path / f"{key_of(CLAIM.job('a', 0))}.json").rename(tmp_path / f"{key_of(CLAIM.job('b', 0))}.json")
    with pytest.raises(
        EquipoiseError, match="must hold the result of the options and of the recipe that its name stands for"
    ):
        results.get(CLAIM.job("b", 0))


def test_the_key_of_a_run_depends_on_its_options_alone():
    assert key_of(Job((("a", 1), ("b", 2)))) != key_of(Job((("a", 1), ("b", 3))))
    assert CLAIM.job("a", 0) == CLAIM.job("a", 0) and key_of(CLAIM.job("a", 0)) != key_of(CLAIM.job("a", 1))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([], "undecided"),
        ([-0.1], "undecided"),
        ([-0.1, -0.11, -0.09, -0.1], "supported"),
        ([0.1, 0.11, 0.09, 0.1], "not supported"),
        ([-0.1, 0.09, -0.05, 0.04], "undecided"),
    ],
)
def test_verdicts_come_from_paired_differences(tmp_path, differences, verdict):
    results = Results(tmp_path)
    _fill(results, differences)
    first, trend = findings([CLAIM], results)
    assert first.verdict == verdict and first.is_primary and not trend.is_primary
    if len(differences) > 1:
        assert first.estimate.n == len(differences)
        assert first.estimate.mean == pytest.approx(sum(differences) / len(differences))
        assert trend.estimate.mean == pytest.approx(-sum(differences) / len(differences))  # from a to b, one doubling


def test_one_claim_is_judged_in_the_family_of_all_claims(tmp_path):
    claim, results = FIRST.claims["2-specialisation"], FIRST.results(tmp_path)
    for seed, difference in enumerate((0.28, 0.3, 0.32)):
        for arm, gain in (("micro", 0.0), ("global", difference), ("loss-free", 0.0)):
            _store(results, claim.job(arm, seed), 5.0)
            stored = results.get(claim.job(arm, seed))
            stored["result"] = {"domain_information_bits": 1.0 + gain}
            write_json(results.folder / f"{key_of(claim.job(arm, seed))}.json", stored)
    (first, *_) = reproduce(Reproduce(claim.name, "first", budget=0, results=tmp_path), Quiet())
    assert first.judgement.p_adjusted == pytest.approx(first.judgement.p * len(FIRST.claims))
    assert 0 < first.judgement.p < 0.06


def test_a_seed_that_only_one_arm_has_is_left_out(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.1, -0.11, -0.09])
    _store(results, CLAIM.job("a", 3), 100.0)
    first, _ = findings([CLAIM], results)
    assert first.estimate.n == 3 and first.means["a"] == pytest.approx(5.9)


def test_an_undecided_claim_says_how_many_seeds_would_support_it(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.1, 0.02, -0.05, 0.01])
    (first, _) = findings([CLAIM], results)
    assert first.verdict == "undecided" and 5 < first.seeds_needed < 100
    assert f"undecided; about {first.seeds_needed} seeds would support it" in _text([CLAIM], [first], results)


def test_the_page_shows_the_figures_and_the_runs_behind_them(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.1, -0.11, -0.09, -0.1])
    text = _text([CLAIM], findings([CLAIM], results), results)
    assert "loss, a − b: −0.1000 [−0.1130, −0.0870], 4 seeds" in text and "| supported |" in text
    assert "| x | small | 8 of 8 | 1 | 2026-01-02 |" in text and "| all | 2 CPU cores | torch 2 |" in text
    assert "| a | `--strategy none` |\n| b | `--strategy loss-free` |" in text
    spread = 0.01 * (2 / 3) ** 0.5  # of -0.1, -0.11, -0.09, -0.1
    (row,) = (line for line in text.splitlines() if line.startswith("| x | loss, a − b | 4 |"))
    cells = [float(cell.replace("−", "-")) for cell in row.strip("| ").split(" | ")[3:]]
    assert cells == [-0.1, pytest.approx(spread, abs=1e-4), pytest.approx(detectable_effect(spread, 4), abs=1e-4)]
    assert "- **Supported: 1 of 1.** [x](results_mechanisms.md#x).\n" in text
    assert "- **Not supported: 0 of 1.**\n- **Undecided: 0 of 1.**\n" in text
    frontiers = {job for frontier in FIRST.frontiers.values() for job in frontier.jobs(results)}
    total = 8 + len(frontiers)
    for job in CLAIM.jobs():
        seconds = 450.0 if job == CLAIM.jobs()[0] else 900.0
        write_json(tmp_path / f"{key_of(job)}.json", results.get(job) | {"seconds": seconds})
    still_open = replace(CLAIM, name="y", arms={"a": CLAIM.arms["a"], "b": {"strategy": "loss-free:rate={loss-free}"}})
    text = _text([CLAIM, still_open], findings([CLAIM], results), results)
    total += 4  # of the arm without a rate yet; the other arm has its runs
    (line,) = (line for line in text.splitlines() if line.startswith("All claims and frontiers:"))
    assert f" 8 of {total} runs. Their steps took 1.9 hours of one core; 1.0 if " in line


def test_the_page_states_the_size_of_the_runs():
    default = Train(out=Path("x"))
    tokens = default.sequences * default.sequence_length
    for words in (
        f"{default.layers} layers of width {default.width}, {default.experts} experts and a shared one, "
        f"{default.experts_per_token} experts per token.",
        f"{default.micro_batches} micro-batches of {tokens:,} tokens",
        f"small has {FIRST.sizes['small']['steps']} steps, standard {FIRST.sizes['standard']['steps']}.",
    ):
        assert words in FIRST.page.reading
    options = {"steps", "qk_norm", "checkpoint_every", "dtype"}
    assert all(set(size) == options for size in FIRST.sizes.values()), (
        "the page must state any other option that differs from its default"
    )
    assert {size["dtype"] for size in FIRST.sizes.values()} == {"bfloat16"}


def test_the_page_has_its_figure_if_the_file_exists(tmp_path):
    results, path = Results(tmp_path), tmp_path / "docs" / "evidence" / "edition" / "page.md"
    write(path, ANY, [CLAIM], [], results)
    assert "![" not in path.read_text()
    figure = path.parent / figure_of(FIRST)
    figure.parent.mkdir()
    figure.touch()
    write(path, ANY, [CLAIM], [], results)
    assert "(../../figures/claims_first.png)" in path.read_text()


def test_the_pages_link_to_each_other_whatever_the_name(tmp_path):
    reproduce(
        Reproduce(edition="first", budget=0, results=tmp_path / "results", page=tmp_path / "pages" / "my own.md"),
        Quiet(),
    )
    texts = {path.name: path.read_text() for path in (tmp_path / "pages").iterdir()}
    assert set(texts) == {"my own.md", "my own_scope.md", "my own_mechanisms.md", "my own_runs.md"}
    headings = {name: set(re.findall(r"^## (.+)$", text, re.MULTILINE)) for name, text in texts.items()}
    assert headings["my own_scope.md"] | headings["my own_mechanisms.md"] >= set(FIRST.claims)
    for name, text in texts.items():
        links = re.findall(r"\]\(([\w.%]*)#([\w-]+)\)", text)
        assert links
        for page, anchor in links:
            titles = {heading.lower().replace(" ", "-") for heading in headings[unquote(page) or name]}
            assert anchor in titles, f"{name} links to {page}#{anchor}"


def test_a_sentence_in_the_notes_of_several_claims_is_said_once(tmp_path):
    first, second = (
        replace(CLAIM, name=name, note=note)
        for name, note in (("4-a", "Eq. 2 differs. Both have `z`. See 4-b."), ("4-b", "Both have `z`."))
    )
    text = pages("results.md", ANY, [first, second, CLAIM], [], Results(tmp_path))["results_mechanisms.md"]
    a, b = (f"[{name}](results_mechanisms.md#{name})" for name in ("4-a", "4-b"))
    assert text.count("Both have `z`.") == 1 and f"- {a}, {b}: Both have `z`.\n" in text
    see = "See also [Notes for several claims](#notes-for-several-claims)."
    assert f"\nEq. 2 differs. See {b}. {see}\n" in text and f"\n{see}\n" in text
    assert "Notes for several" not in _text([first, CLAIM], [], Results(tmp_path))


def test_runs_of_other_machines_are_told_apart(tmp_path):
    results, other = Results(tmp_path), replace(CLAIM, name="y", first_seed=4)
    for claim in (CLAIM, other):
        _store(results, claim.job("a", claim.first_seed), 5.0)
    path = tmp_path / f"{key_of(other.job('a', 4))}.json"
    write_json(path, read_json(path) | {"hardware": "8 CPU cores"})
    text = _text([CLAIM, other, replace(CLAIM, name="z", first_seed=8)], [], results)
    assert "| x | 2 CPU cores | torch 2 |\n| y | 8 CPU cores | torch 2 |\n" in text
    assert "| z | small | 0 of 8 | 0 | none |" in text


def test_the_index_of_the_evidence_has_the_verdicts_of_the_stored_results():
    root = Path(__file__).parents[3]
    results = Results(root / "benchmarks" / "results" / "claims" / "first")
    claims = FIRST.claims_with_values(results)
    primary = {finding.claim.name: finding for finding in findings(claims, results) if finding.is_primary}
    number = Counter(finding.verdict for finding in primary.values())
    index = " ".join((root / "docs" / "evidence" / "index.md").read_text(encoding="utf-8").split())
    runs = len([*results.folder.glob("*.json")])
    assert f"{len(primary)} claims of papers were tested in {runs} runs" in index
    assert (
        f"{number['supported']} are supported, {number['not supported']} are not, and {number['undecided']} are"
        in index
    )
    scope, domains = (primary[name].estimate for name in ("1-scope", "2-specialisation"))
    low, high = scope.interval
    assert f"by {-scope.mean:.4f} nats ({-high:.4f} to {-low:.4f}, {scope.n} seeds)" in index
    low, high = domains.interval
    assert f"{domains.mean:.3f} bits more about the domain ({low:.3f} to {high:.3f}, {domains.n} seeds)" in index
    lost = [name for name, finding in primary.items() if finding.verdict == "not supported"]
    assert lost == ["4-loss-free-same-scope", "5-rules"], "the index says which claims did not hold"


def test_the_leaderboard_uses_the_seeds_that_all_arms_have(tmp_path):
    claim, results = replace(CLAIM, name=LEADERBOARD), Results(tmp_path)
    _fill(results, [-0.1, -0.3])
    _store(results, CLAIM.job("a", 2), 100.0)
    for job in claim.jobs():
        if (stored := results.get(job)) is not None:
            stored["result"] |= {"maxvio_global": 0.5, "domain_information_bits": 0.25}
            write_json(tmp_path / f"{key_of(job)}.json", stored)
    text = pages("results.md", ANY, [claim], findings([claim], results), results)["results.md"]
    rows = [line for line in text.splitlines() if line.startswith("| a |") or line.startswith("| b |")]
    assert rows == ["| a | `none` | 5.3000 | 0.500 | 0.250 |", "| b | `loss-free` | 5.5000 | 0.500 | 0.250 |"]
    assert f"claim {LEADERBOARD} over the 2 seeds" in text


def test_a_budget_of_zero_runs_nothing_and_reports_stored_results(tmp_path):
    options = Reproduce("1-scope", "first", budget=0, out=tmp_path / "work", results=tmp_path / "results", json=True)
    reported = reproduce(options, Quiet())
    assert [finding.verdict for finding in reported] == ["undecided"] * len(reported)
    assert json.loads(json.dumps(as_json(reported)))[0]["seeds"] == 0
    assert table_rows(reported)[0][:2] == ("loss, global − micro", "lower")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claim": "9"}, "CLAIM must be all or one of"),
        ({"budget": -1.0}, "--budget must be a number of minutes"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"claim": "1-scope", "page": SimpleNamespace()}, "--page must go with all claims"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Reproduce(**{"edition": "first", **options}).check()


def test_claims_share_runs():
    chosen = dict.fromkeys(FIRST.frontiers, CHOICE)
    scope, special, same = (
        set(FIRST.claims[name].with_values(chosen).jobs())
        for name in ("1-scope", "2-specialisation", "4-loss-free-same-scope")
    )
    assert len(scope & special) == 6
    assert len(scope & same) == 8


def test_all_claims_fit_into_seven_hours_of_two_cores():
    """At a minute a small run and two and a half a standard run, each on one of two busy cores."""
    chosen = dict.fromkeys(FIRST.frontiers, CHOICE)
    jobs = {job for name in FIRST.claims for job in FIRST.claims[name].with_values(chosen).jobs()}
    jobs |= {job for frontier in FIRST.frontiers.values() for job in frontier.jobs(Results(Path("nowhere")))}
    minutes = {80: 1.0, 200: 2.5}
    assert sum(minutes[dict(job.options)["steps"]] for job in jobs) / 2 < 7 * 60


def test_the_shipped_results_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["reproduce", "--edition", "first", "--budget", "0"])
    out, err = capsys.readouterr()
    titles, *rows = out.splitlines()
    assert titles.split()[:2] == ["claim", "verdict"] and [row.split()[0] for row in rows] == list(FIRST.claims)
    assert max(map(len, rows)) < 80, "one line a claim, also in a terminal of 80 characters"
    assert re.search(r"^1-scope +supported +−0.0675 ", rows[0]) and "not run" not in out
    assert "not a folder" not in err and "equipoise reproduce CLAIM --budget 0" in err
    main(["reproduce", "1-scope", "--edition", "first", "--budget", "0", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["verdict"] == "supported" and "loss, global − micro" in err


def test_new_results_come_before_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Reproduce("1-scope", "first", budget=0)
    (shipped,) = [one for one in reproduce(options, Quiet()) if one.is_primary]
    claim = shipped.claim
    for arm in claim.primary.arms:
        for seed in claim.all_seeds:
            _store(FIRST.results(options.results), claim.job(arm, seed), 1.0 + seed / 100)
    (ours,) = [one for one in reproduce(options, Quiet()) if one.is_primary]
    assert shipped.estimate.mean < -0.05 and ours.estimate.mean == 0


def test_a_claim_without_runs_is_not_run(tmp_path, capsys):
    main(["reproduce", "--edition", "first", "--budget", "0", "--results", str(tmp_path / "new")])
    out, err = capsys.readouterr()
    assert [row.split() for row in out.splitlines()[1:]] == [[name, "not", "run"] for name in FIRST.claims]
    assert "is not a folder, so there are no stored results yet." in err
    main(["reproduce", "1-scope", "--edition", "first", "--budget", "0", "--results", str(tmp_path / "new"), "--json"])
    assert {one["verdict"] for one in json.loads(capsys.readouterr().out)} == {"not run"}
    finding = findings([CLAIM], Results(tmp_path / "new"))[0]
    assert verdict_text(finding) == "not run" and verdict_text(replace(finding, diverged=1)) == "undecided"
