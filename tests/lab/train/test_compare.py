"""Comparisons: results, resuming, failed runs and refused options."""

import dataclasses
import json
import os
import shutil

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.train import loop as training
from equipoise_lab.train.compare import compare
from equipoise_lab.train.comparison_folder import ComparisonFolder
from equipoise_lab.train.config import Compare, _Run, folder_name
from equipoise_lab.train.run_folder import FolderLock
from equipoise_lab.train.watch import Terminal


@pytest.fixture
def make_comparison(tiny, tmp_path):
    common = {field.name: getattr(tiny(steps=3), field.name) for field in dataclasses.fields(_Run)}
    common |= {"out": tmp_path / "out", "workers": 1}

    def make(**options):
        return Compare(**{**common, "strategies": ("none", "lbl:scope=micro_batch"), **options})

    return make


def _without_times(results):
    return [{key: value for key, value in result.items() if key != "tokens_per_second"} for result in results]


def test_compare_writes_results_runs_and_the_report_page(make_comparison, new_watcher):
    config = make_comparison(seeds=2)
    results, _ = compare(config, new_watcher(), "equipoise compare ...")
    assert json.loads((config.out / "results.json").read_text()) == results
    assert [(r["strategy"], r["seed"]) for r in results] == [
        ("none", 0), ("lbl:scope=micro_batch", 0), ("none", 1), ("lbl:scope=micro_batch", 1)
    ]  # fmt: skip
    assert (config.out / "report.html").stat().st_size > 100_000
    assert "equipoise compare ..." in (config.out / "report.html").read_text()
    for result in results:
        assert (config.out / folder_name(result["strategy"], result["seed"]) / "result.json").exists()


def test_two_comparisons_give_the_same_results(make_comparison, new_watcher, tmp_path):
    first, _ = compare(make_comparison(), new_watcher())
    second, _ = compare(make_comparison(out=tmp_path / "again"), new_watcher())
    assert _without_times(first) == _without_times(second)


def test_a_stopped_comparison_can_be_resumed(make_comparison, new_watcher, tmp_path):
    whole, _ = compare(make_comparison(out=tmp_path / "whole"), new_watcher())
    with pytest.raises(KeyboardInterrupt):
        compare(make_comparison(), new_watcher(stop_after=2))
    with pytest.raises(EquipoiseError, match="must be new or empty"):
        compare(make_comparison(), new_watcher())
    resumed, _ = compare(make_comparison(resume=True), new_watcher())
    assert _without_times(resumed) == _without_times(whole)


def test_a_failed_run_does_not_stop_the_others(make_comparison, new_watcher, monkeypatch):
    original = training.language_model_loss
    monkeypatch.setattr(
        training,
        "language_model_loss",
        lambda model, ids: original(model, ids) * (1 if calls.append(1) or len(calls) > 1 else float("nan")),
    )
    calls = []
    config, watcher = make_comparison(), new_watcher()
    results, failure = compare(config, watcher)
    assert len(results) == 1
    assert "none, seed 0, is nan" in str(failure)
    assert [r["strategy"] for r in json.loads((config.out / "results.json").read_text())] == ["lbl:scope=micro_batch"]
    assert "not finished" in (config.out / "report.html").read_text()


def test_a_folder_with_other_files_is_left_unchanged(make_comparison, new_watcher):
    config = make_comparison()
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(EquipoiseError, match=r"holds thesis.tex"):
        compare(config, new_watcher())
    with pytest.raises(EquipoiseError, match=r"has no compare.json"):
        compare(make_comparison(resume=True), new_watcher())
    assert [path.name for path in config.out.iterdir()] == ["thesis.tex"]


def test_strategies_must_differ_and_exist(make_comparison, new_watcher):
    with pytest.raises(UsageError, match="must be different: got none and none"):
        compare(make_comparison(strategies=("none", "none")), new_watcher())
    with pytest.raises(UsageError, match="must be different: got lbl and lbl:coefficient=1e-2"):
        compare(make_comparison(strategies=("lbl", "lbl:coefficient=1e-2")), new_watcher())
    with pytest.raises(UsageError, match="made of"):
        compare(make_comparison(strategies=("none", "magic")), new_watcher())
    with pytest.raises(UsageError, match="at least 1"):
        compare(make_comparison(seeds=0), new_watcher())


def test_a_bad_data_folder_is_reported_once_and_not_per_strategy(make_comparison, new_watcher, tmp_path):
    watcher = new_watcher()
    with pytest.raises(UsageError):
        compare(make_comparison(data=str(tmp_path / "nowhere")), watcher)
    assert not any("nowhere" in line for line in watcher.said[1:])


def test_a_resumed_comparison_must_keep_its_options_and_keeps_its_results(make_comparison, new_watcher):
    config = make_comparison(steps=1)
    compare(config, new_watcher())
    before = {name: (config.out / name).read_bytes() for name in ("compare.json", "results.json", "report.html")}
    with pytest.raises(EquipoiseError, match="has steps=1, got 2"):
        compare(make_comparison(steps=2, resume=True), new_watcher())
    with pytest.raises(EquipoiseError, match="may be added, but not removed once they have begun"):
        compare(make_comparison(steps=1, resume=True, strategies=("none",)), new_watcher())
    assert before == {name: (config.out / name).read_bytes() for name in before}
    more, _ = compare(
        make_comparison(steps=1, resume=True, strategies=("none", "lbl:scope=micro_batch", "loss-free")), new_watcher()
    )
    assert len(more) == 3


def test_every_strategy_of_a_comparison_can_switch_to_a_second_one(make_comparison, new_watcher):
    results, _ = compare(make_comparison(then="z", switch_at=1), new_watcher())
    assert [r["strategy"] for r in results] == ["none, after step 1 z", "lbl:scope=micro_batch, after step 1 z"]
    with pytest.raises(UsageError, match="--then must be another strategy than --strategy: got none after none"):
        compare(make_comparison(out=make_comparison().out / "new", then="none", switch_at=1), new_watcher())


def test_if_every_run_diverges_the_error_reports_divergence(make_comparison, new_watcher, monkeypatch):
    original = training.language_model_loss
    monkeypatch.setattr(training, "language_model_loss", lambda *args: original(*args) * float("nan"))
    results, failure = compare(make_comparison(), new_watcher())
    assert results == []
    assert "must not diverge" in str(failure)


def test_a_comparison_killed_during_its_first_write_can_be_resumed(make_comparison, new_watcher):
    config = make_comparison(steps=1)
    run = config.runs()[1].out
    config.out.mkdir()
    (config.out / ".compare.json.tmp").write_text("{")
    compare(make_comparison(steps=1, resume=True, strategies=("none",)), new_watcher())
    run.mkdir()
    (run / ".config.json.tmp").write_text("{")
    results, _ = compare(make_comparison(steps=1, resume=True), new_watcher())
    assert len(results) == 2


def test_the_terminal_counts_complete_runs_too(make_comparison, capsys):
    compare(make_comparison(steps=1, strategies=("none",)), Terminal())
    compare(make_comparison(steps=1, resume=True), Terminal(num_runs=2))
    output = capsys.readouterr().err
    assert "[1/2] none: all 1 steps are trained" in output
    assert "[2/2] lbl:scope=micro_batch  step 1/1" in output


# ---- nothing is claimed before the inputs are right ----


def test_a_comparison_on_bad_text_leaves_nothing(make_comparison, new_watcher, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "one.txt").write_text("a single document")
    config = make_comparison(steps=1, out=tmp_path / "new" / "out")
    with pytest.raises(EquipoiseError, match="at least 4 different documents"):
        compare(dataclasses.replace(config, data=str(bad)), new_watcher())
    assert not (tmp_path / "new").exists()
    assert len(compare(config, new_watcher())[0]) == 2


def test_a_comparison_whose_first_run_cannot_begin_leaves_nothing(make_comparison, new_watcher, monkeypatch):
    def fail(*arguments):
        raise EquipoiseError("no model")

    with monkeypatch.context() as patched:
        patched.setattr(training, "build_model", fail)
        with pytest.raises(EquipoiseError, match="no model"):
            compare(make_comparison(), new_watcher())
    assert not make_comparison().out.exists()
    with monkeypatch.context() as patched:
        patched.setattr(training._Training, "_step", fail)
        with pytest.raises(EquipoiseError, match="no model"):
            compare(make_comparison(), new_watcher())
    assert not make_comparison().out.exists()


def test_a_comparison_that_was_killed_before_a_step_blocks_no_other(make_comparison, new_watcher, monkeypatch):
    config = make_comparison(steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(
            ComparisonFolder, "release", lambda folder: os.close(folder._lock.descriptor)
        )  # as SIGKILL does
        patched.setattr(training._Training, "_step", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compare(config, new_watcher())
    assert (config.out / "compare.json").exists() and (config.runs()[0].out / "config.json").exists()
    results, _ = compare(make_comparison(steps=2, strategies=("z",)), new_watcher())
    assert [(result["strategy"], result["steps"]) for result in results] == [("z", 2)]


def test_a_strategy_that_has_not_begun_may_be_removed(make_comparison, new_watcher, monkeypatch):
    attach = training.attach_strategy

    def attach_all_but_z(model, strategy, **options):
        if strategy == "z":
            raise EquipoiseError("z cannot be attached")
        return attach(model, strategy, **options)

    monkeypatch.setattr(training, "attach_strategy", attach_all_but_z)
    first, failure = compare(make_comparison(strategies=("none", "z")), new_watcher())
    assert len(first) == 1 and "z cannot be attached" in str(failure)
    results, failure = compare(make_comparison(strategies=("none", "lbl"), resume=True), new_watcher())
    assert [result["strategy"] for result in results] == ["none", "lbl"] and failure is None
    with pytest.raises(EquipoiseError, match="may be added, but not removed once they have begun"):
        compare(make_comparison(strategies=("none",), resume=True), new_watcher())


def test_a_run_that_failed_before_a_step_blocks_no_other(tiny, new_watcher, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(training._Training, "_step", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training.train(tiny(), new_watcher())
    assert training.train(tiny(steps=1, seed=1, save_model=False), new_watcher())["seed"] == 1


@pytest.mark.parametrize("content", ['{"model_type": "mixtral"}', "{torn", "[]"])
def test_a_config_of_something_else_is_not_replaced(tiny, new_watcher, content):
    tiny().out.mkdir()
    (tiny().out / "config.json").write_text(content)
    with pytest.raises(EquipoiseError, match=r"must be new or empty: .* holds config\.json"):
        training.train(tiny(), new_watcher())
    assert (tiny().out / "config.json").read_text() == content


def test_only_one_process_may_compare_in_a_folder(make_comparison, new_watcher):
    lock = FolderLock(make_comparison().out)
    with pytest.raises(EquipoiseError, match="only one process may train in a folder"):
        compare(make_comparison(), new_watcher())
    lock.release()
    assert not any(make_comparison().out.iterdir())


def test_the_folder_is_checked_before_the_text_is_read(make_comparison, tiny, new_watcher, tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise_lab.train.run_text.load_corpus", None)
    (tmp_path / "file").touch()
    for command, config in ((compare, make_comparison()), (training.train, tiny())):
        with pytest.raises(EquipoiseError, match="--out must be a folder that can be written: .* is a file"):
            command(dataclasses.replace(config, out=tmp_path / "file" / "out"), new_watcher())


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_skipped_of_the_text_is_said_once(make_comparison, new_watcher, tmp_path, text, workers):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    (folder / "logo.png").write_bytes(b"\0")
    watcher = new_watcher()
    compare(make_comparison(steps=1, data=str(folder), workers=workers), watcher)
    assert watcher.said.count("skipped 1 file: 1 not text (logo.png)") == 1
