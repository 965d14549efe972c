import dataclasses
import json

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.train import train as training
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare, _Run, folder_name
from equipoise_lab.train.watch import Terminal


@pytest.fixture
def two(tiny, tmp_path):
    common = {field.name: getattr(tiny(steps=3), field.name) for field in dataclasses.fields(_Run)}
    common |= {"out": tmp_path / "out", "workers": 1}

    def make(**options):
        return Compare(**{**common, "strategies": ("none", "lbl:scope=micro_batch"), **options})

    return make


def _without_times(results):
    return [{key: value for key, value in result.items() if key != "tokens_per_second"} for result in results]


def test_compare_writes_results_runs_and_the_page(two, silent):
    config = two(seeds=2)
    results, _ = compare(config, silent(), "equipoise compare ...")
    assert json.loads((config.out / "results.json").read_text()) == results
    assert [(r["strategy"], r["seed"]) for r in results] == [
        ("none", 0), ("lbl:scope=micro_batch", 0), ("none", 1), ("lbl:scope=micro_batch", 1)
    ]  # fmt: skip
    assert (config.out / "report.html").stat().st_size > 100_000
    assert "equipoise compare ..." in (config.out / "report.html").read_text()
    for result in results:
        assert (config.out / folder_name(result["strategy"], result["seed"]) / "result.json").exists()


def test_two_comparisons_give_the_same_results(two, silent, tmp_path):
    first, _ = compare(two(), silent())
    second, _ = compare(two(out=tmp_path / "again"), silent())
    assert _without_times(first) == _without_times(second)


def test_a_comparison_that_was_stopped_goes_on(two, silent, tmp_path):
    whole, _ = compare(two(out=tmp_path / "whole"), silent())
    with pytest.raises(KeyboardInterrupt):
        compare(two(), silent(stop_after=2))
    with pytest.raises(EquipoiseError, match="must be new or empty"):
        compare(two(), silent())
    resumed, _ = compare(two(resume=True), silent())
    assert _without_times(resumed) == _without_times(whole)


def test_a_run_that_fails_does_not_stop_the_others(two, silent, monkeypatch):
    original = training.language_model_loss
    monkeypatch.setattr(
        training,
        "language_model_loss",
        lambda model, ids: original(model, ids) * (1 if calls.append(1) or len(calls) > 1 else float("nan")),
    )
    calls = []
    config, watcher = two(), silent()
    results, failure = compare(config, watcher)
    assert len(results) == 1
    assert "none, seed 0, is nan" in str(failure)
    assert [r["strategy"] for r in json.loads((config.out / "results.json").read_text())] == ["lbl:scope=micro_batch"]
    assert "not finished" in (config.out / "report.html").read_text()


def test_a_folder_that_holds_something_else_is_left_alone(two, silent):
    config = two()
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(EquipoiseError, match=r"holds thesis.tex"):
        compare(config, silent())
    with pytest.raises(EquipoiseError, match=r"has no compare.json"):
        compare(two(resume=True), silent())
    assert [path.name for path in config.out.iterdir()] == ["thesis.tex"]


def test_strategies_must_differ_and_exist(two, silent):
    with pytest.raises(UsageError, match="must be different: got none, none"):
        compare(two(strategies=("none", "none")), silent())
    with pytest.raises(UsageError, match="must be different: got lbl, lbl:coefficient=1e-2"):
        compare(two(strategies=("lbl", "lbl:coefficient=1e-2")), silent())
    with pytest.raises(UsageError, match="made of"):
        compare(two(strategies=("none", "magic")), silent())
    with pytest.raises(UsageError, match="at least 1"):
        compare(two(seeds=0), silent())


def test_a_bad_data_folder_is_one_error_not_one_a_strategy(two, silent, tmp_path):
    watcher = silent()
    with pytest.raises(UsageError):
        compare(two(data=str(tmp_path / "nowhere")), watcher)
    assert not any("nowhere" in line for line in watcher.said[1:])


def test_a_comparison_goes_on_with_the_same_options_only_and_keeps_its_results(two, silent):
    config = two(steps=1)
    compare(config, silent())
    before = {name: (config.out / name).read_bytes() for name in ("compare.json", "results.json", "report.html")}
    with pytest.raises(EquipoiseError, match="has steps=1, got 2"):
        compare(two(steps=2, resume=True), silent())
    with pytest.raises(EquipoiseError, match="may be added, not left out"):
        compare(two(steps=1, resume=True, strategies=("none",)), silent())
    assert before == {name: (config.out / name).read_bytes() for name in before}
    more, _ = compare(two(steps=1, resume=True, strategies=("none", "lbl:scope=micro_batch", "loss-free")), silent())
    assert len(more) == 3


def test_every_strategy_of_a_comparison_may_hand_over_to_another(two, silent):
    results, _ = compare(two(then="z", switch_at=1), silent())
    assert [r["strategy"] for r in results] == ["none, after step 1 z", "lbl:scope=micro_batch, after step 1 z"]
    with pytest.raises(UsageError, match="--then must be another strategy than --strategy: got none after none"):
        compare(two(out=two().out / "new", then="none", switch_at=1), silent())


def test_when_every_run_diverges_the_divergence_is_the_error(two, silent, monkeypatch):
    original = training.language_model_loss
    monkeypatch.setattr(training, "language_model_loss", lambda *given: original(*given) * float("nan"))
    results, failure = compare(two(), silent())
    assert results == []
    assert "must not diverge" in str(failure)


def test_a_comparison_that_was_killed_in_its_first_write_goes_on(two, silent):
    config = two(steps=1)
    run = config.runs()[1].out
    config.out.mkdir()
    (config.out / ".compare.json.tmp").write_text("{")
    compare(two(steps=1, resume=True, strategies=("none",)), silent())
    run.mkdir()
    (run / ".config.json.tmp").write_text("{")
    results, _ = compare(two(steps=1, resume=True), silent())
    assert len(results) == 2


def test_the_terminal_counts_complete_runs_too(two, capsys):
    compare(two(steps=1, strategies=("none",)), Terminal())
    compare(two(steps=1, resume=True), Terminal(num_runs=2))
    said = capsys.readouterr().err
    assert "[1/2] none: complete already" in said
    assert "[2/2] lbl:scope=micro_batch  step 1/1" in said
