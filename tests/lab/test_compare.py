import dataclasses
import json

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise.lab import train as training
from equipoise.lab.compare import compare
from equipoise.lab.config import Compare, _Run, folder_name


@pytest.fixture
def two(tiny, tmp_path):
    common = {field.name: getattr(tiny(steps=3), field.name) for field in dataclasses.fields(_Run)}
    common["out"] = tmp_path / "out"

    def make(**options):
        return Compare(**{**common, "strategies": ("none", "lbl:scope=micro_batch"), **options})

    return make


def _without_times(results):
    return [{key: value for key, value in result.items() if key != "tokens_per_second"} for result in results]


def test_compare_writes_results_runs_and_the_page(two, silent):
    config = two(seeds=2)
    results = compare(config, silent(), "equipoise compare ...")
    assert json.loads((config.out / "results.json").read_text()) == results
    assert [(r["strategy"], r["seed"]) for r in results] == [
        ("none", 0), ("lbl:scope=micro_batch", 0), ("none", 1), ("lbl:scope=micro_batch", 1)
    ]  # fmt: skip
    assert (config.out / "report.html").stat().st_size > 100_000
    assert "equipoise compare ..." in (config.out / "report.html").read_text()
    for result in results:
        assert (config.out / folder_name(result["strategy"], result["seed"]) / "result.json").exists()


def test_two_comparisons_give_the_same_results(two, silent, tmp_path):
    first = compare(two(), silent())
    second = compare(two(out=tmp_path / "again"), silent())
    assert _without_times(first) == _without_times(second)


def test_a_comparison_that_was_stopped_goes_on(two, silent, tmp_path):
    whole = compare(two(out=tmp_path / "whole"), silent())
    with pytest.raises(KeyboardInterrupt):
        compare(two(), silent(stop_after=2))
    with pytest.raises(EquipoiseError, match="must be new or empty"):
        compare(two(), silent())
    resumed = compare(two(resume=True), silent())
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
    with pytest.raises(EquipoiseError, match="none, seed 0, is nan"):
        compare(config, watcher)
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
    with pytest.raises(UsageError, match="got none twice"):
        compare(two(strategies=("none", "none")), silent())
    with pytest.raises(UsageError, match="must be made of"):
        compare(two(strategies=("none", "magic")), silent())
    with pytest.raises(UsageError, match="at least 1"):
        compare(two(seeds=0), silent())


def test_a_bad_data_folder_is_one_error_not_one_a_strategy(two, silent, tmp_path):
    watcher = silent()
    with pytest.raises(UsageError):
        compare(two(data=str(tmp_path / "nowhere")), watcher)
    assert not any("nowhere" in line for line in watcher.said[1:])
