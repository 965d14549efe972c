"""Runs with one damage each: a reader names the run and the file, or draws it; the other run is always drawn."""

import shutil

import pytest
from mutations import mutations

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis.tables import read_records
from equipoise_lab.records import Run
from equipoise_lab.report import write_report
from equipoise_lab.train import run_folder
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare
from equipoise_lab.train.loop import train
from equipoise_lab.train.run_folder import RunFolder, SilentWatcher
from equipoise_lab.train.watch import print_table

STRATEGIES = ("none", "loss-free:rate=1e-2")
GOOD, BROKEN = "none_seed0", "loss-free_rate-1e-2_seed0"
EVERY = {"config.json": 37, "steps.jsonl": 41, "loads.jsonl": 17, "evaluations.jsonl": 101, "audit.json": 131}


@pytest.fixture(scope="module")
def options(text):
    return {
        "data": str(text), "vocab_size": 300, "steps": 3, "layers": 1, "width": 32, "experts": 4,
        "experts_per_token": 2, "expert_width": 16, "sequence_length": 16, "sequences": 2, "micro_batches": 3,
        "evaluation_sequences": 8, "checkpoint_every": 2, "dtype": "float32", "save_model": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def comparison(options, tmp_path_factory):
    """Two finished runs of different strategies."""
    folder = tmp_path_factory.mktemp("runs") / "comparison"
    compare(Compare(out=folder, strategies=STRATEGIES, workers=1, **options), SilentWatcher())
    (folder / "report.html").unlink()
    return folder


def _damaged(comparison, tmp_path, name, content):
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(comparison, folder)
    path = folder / name
    path.unlink() if content is None else path.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "name", ["config.json", "steps.jsonl", "loads.jsonl", "evaluations.jsonl", "audit.json", "result.json"]
)
def test_a_damaged_run_is_named_or_drawn_and_the_other_is_drawn(comparison, tmp_path, capsys, name):
    content = (comparison / BROKEN / name).read_bytes()
    num_named = num_drawn = 0
    for what, changed in mutations(content, is_log=name.endswith("l"), every=EVERY.get(name, 29)):
        folder = _damaged(comparison, tmp_path, f"{BROKEN}/{name}", changed)
        records = read_records(folder)
        for table in (records.runs, records.steps, records.domains, records.experts, records.typical_tokens):
            table()
        records.loads()
        print_table(folder)
        problems = [problem for problem in records.problems if problem.kind in ("damaged", "without its audit")]
        names = [run.name for run in records.recorded_runs]
        assert GOOD in names, what
        if problems:
            num_named += 1
            assert [problem.name for problem in problems] == [BROKEN], what
            assert f"{BROKEN}/{name}" in problems[0].reason, (what, problems[0].reason)
            if problems[0].kind == "damaged":
                assert names == [GOOD] and problems[0].reason in capsys.readouterr().err, what
        elif changed is not None:
            num_drawn += 1
            write_report(folder)
    assert num_named >= 8 and num_named > num_drawn, (num_named, num_drawn)


@pytest.mark.parametrize(
    ("name", "every"), [("compare.json", 59), (f"{BROKEN}/result.json", 97), (f"{BROKEN}/config.json", 131)]
)
def test_a_damaged_comparison_is_continued_or_named(comparison, options, tmp_path, name, every):
    content, num_named = (comparison / name).read_bytes(), 0
    for what, changed in mutations(content, is_log=False, every=every):
        if changed is None and "/" in name:
            continue  # a run without its config is trained again, one without its result continues
        folder = _damaged(comparison, tmp_path, name, changed)
        config = Compare(out=folder, strategies=STRATEGIES, workers=1, resume=True, **options)
        try:
            _, failure = compare(config, SilentWatcher())
        except EquipoiseError as error:
            failure = error
        if failure is not None:
            num_named += 1
            assert name in str(failure) or "must keep its" in str(failure), (what, failure)
    assert num_named >= 7


@pytest.fixture(scope="module")
def stopped(options, tmp_path_factory):
    """A run that was stopped in its last step, and what its process passes to the run folder."""
    config = Compare(out=tmp_path_factory.mktemp("stopped"), strategies=STRATEGIES[1:], **options).runs()[0]
    opened = []

    class Recording(RunFolder):
        def open(self, facts, machine):
            opened[:] = [facts, machine]
            return super().open(facts, machine)

    class Stop(SilentWatcher):
        def step(self, row, tokens_per_second):
            if row["step"] == 3:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise_lab.train.loop.RunFolder", Recording)
        with pytest.raises(KeyboardInterrupt):
            train(config, Stop())
    return config, *opened


@pytest.mark.parametrize("name", ["config.json", "steps.jsonl", "loads.jsonl"])
def test_a_damaged_run_is_resumed_or_named(stopped, tmp_path, name):
    import dataclasses

    config, facts, machine = stopped
    content, num_named = (config.out / name).read_bytes(), 0
    for what, changed in mutations(content, is_log=name.endswith("l"), every=EVERY[name] // 8):
        out = _damaged(config.out, tmp_path, name, changed)
        folder = RunFolder(dataclasses.replace(config, out=out, resume=True), SilentWatcher())
        try:
            folder.open(facts, machine)
            folder.begin(2)
            assert [row["step"] for row in Run(out).rows("steps")] == [1, 2], what
            assert all(row[key] >= 0 for row in folder.records.rows("steps") for key in run_folder.AVERAGED), what
        except EquipoiseError as error:
            num_named += 1
            assert name in str(error) or "must keep its" in str(error), (what, error)
        finally:
            folder.release()
    assert num_named >= 7
