"""Where a lab step goes adds up, and docs/speed.md is what the stored results make."""

import importlib
from dataclasses import replace

import pytest
from test_benchmarks import tiny

from equipoise_lab.records import Run
from equipoise_lab.train.config import Train

__all__ = ["tiny"]

lab_step = importlib.import_module("lab_step")
overhead = importlib.import_module("overhead")
speed = importlib.import_module("speed")


@pytest.mark.slow
def test_the_parts_of_a_step_add_up_and_the_step_is_the_labs(tiny, tmp_path):
    from equipoise_lab.train.loop import train

    class Silent:
        say = begin = step = end = lambda *arguments: None

    train(replace(tiny, out=tmp_path / "plain", steps=4), Silent())
    before = lab_step.torch.Tensor.backward, lab_step.nn.utils.clip_grad_norm_, lab_step.lab_train.language_model_loss
    asked = replace(tiny, steps=4)
    found = lab_step.where(asked)
    after = lab_step.torch.Tensor.backward, lab_step.nn.utils.clip_grad_norm_, lab_step.lab_train.language_model_loss
    assert after == before
    timed, plain = ([row["loss"] for row in Run(out).rows("steps")] for out in (asked.out, tmp_path / "plain"))
    assert timed == plain and len(timed) == 4
    step = found["step"]
    assert [row["part"] for row in step["parts"]] == list(lab_step.PARTS) and step["steps"] == 2
    assert sum(row["share"] for row in step["parts"]) == pytest.approx(1)
    assert all(row["share"] > 0 and row["seconds"] > 0 for row in step["parts"])
    assert step["seconds_of_parts"] == pytest.approx(step["seconds"]), "a median of two is their mean, which adds up"
    assert found["tokens_per_step"] == 2 * 2 * 16
    assert all(row["seconds"] > 0 for row in found["run"]["rows"])


def test_what_a_run_does_beside_its_steps_is_shared_out_over_them(tmp_path):
    seconds = {
        "evaluation, selection text": 2.0,
        "checkpoint": 1.0,
        "last evaluation, test text, by token": 3.0,
        "model, audit and result": 4.0,
    }
    times = {
        (80, 0, 20): [1, 3, 1, 1],  # the last step is followed by the end, not by a checkpoint
        (81, 20, 40): [5, 2, 1, 1],
    }
    for (steps, evaluate_every, checkpoint_every), expected in times.items():
        asked = Train(
            out=tmp_path, steps=steps, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every
        )  # fmt: skip
        rows = lab_step.over_a_run(seconds, 0.5, asked)
        assert [row["times"] for row in rows] == expected
        for row in rows:
            assert row["seconds_a_step"] == pytest.approx(seconds[row["what"]] * row["times"] / steps)
            assert row["over_step"] == pytest.approx(row["seconds_a_step"] / 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("own", "ways"), [("bfloat16", 3), ("float32", 2)])
def test_what_cannot_be_compiled_is_told(tiny, tmp_path, monkeypatch, own, ways):
    def fail(training):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(lab_step, "compile_layers", fail)
    monkeypatch.setattr(lab_step, "config", lambda steps, folder, **given: replace(tiny, out=folder, **given))
    monkeypatch.setattr(lab_step, "other_precision", lambda: (own, "the other"))
    rows = lab_step.compiled(tmp_path / "runs", rounds=1)
    assert [row["error"] for row in rows] == ["RuntimeError: no compiler here"] * ways
    assert not any("ratio" in row for row in rows)


@pytest.mark.slow
def test_remedies_are_steps_of_the_same_run_taken_in_turn(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        lab_step, "config", lambda steps, folder, **given: replace(tiny, out=folder, steps=steps, **given)
    )
    threads = lab_step.torch.get_num_threads()
    lab_step.torch.set_num_threads(1)
    try:
        rows = lab_step.threads_and_precision(tmp_path / "runs", rounds=2)
        assert lab_step.torch.get_num_threads() == 1
    finally:
        lab_step.torch.set_num_threads(threads)
    assert [row["remedy"] for row in rows] == ["threads", "precision"]
    assert {rows[1]["lab"], rows[1]["other"]} == {"bfloat16", "float32"}
    assert all(row["ratio"]["rounds"] == 2 and row["ratio"]["median"] > 0 for row in rows)
    found = lab_step.memory(replace(tiny, out=tmp_path / "memory", steps=3), kept=True)
    assert found["seconds"] > 0 and found["minor_faults"] >= 0


def test_alerts_are_timed_where_they_judge_and_where_they_do_not():
    row = overhead.alerts(layers=2, experts=4, k=2, tokens=64, rounds=1)
    assert (row["layers"], row["experts"]) == (2, 4)
    assert min(row["milliseconds"], row["milliseconds_judged"], row["milliseconds_mean"]) > 0


@pytest.mark.slow
def test_the_collectives_are_those_of_ranks_that_pool():
    row = overhead.collectives(layers=2, experts=16, tokens=32, rounds=3)
    assert (row["ranks"], row["collectives"], row["collective_bytes"]) == (2, 1, 8 * 2 * 16)
    assert row["milliseconds"] > 0 and row["milliseconds_alone"] > 0 and row["ratio"]["rounds"] == 3


def test_the_page_of_speed_is_what_the_stored_results_make():
    stored = speed.results()
    made = speed.page(stored)
    assert made == speed.PAGE.read_text()
    changed = {**stored, "trainer": {**stored["trainer"], "tokens_per_step": 1}}
    assert speed.page(changed) != made


def test_the_page_of_speed_says_why_a_bar_is_missed_only_where_it_is():
    stored = speed.results()
    none, *rows = stored["overhead"]["steps"]

    def page(holds, low):
        new = [
            {**row, "holds": holds, "ratio": {**row["ratio"], "median": low}} if row["limit"] is not None else row
            for row in rows
        ]
        return speed.page({**stored, "overhead": {**stored["overhead"], "steps": [none, *new]}})

    assert not any(why in page(True, 1.0) for why in speed.WHY_STEP.values())
    assert all(why in page(False, 2.0) for why in speed.WHY_STEP.values())
    assert speed.WHY_INTERVAL in page(False, 1.0) and speed.WHY_INTERVAL not in page(False, 2.0)


def test_rows_that_an_older_result_lacks_are_left_out_and_no_others():
    stored = speed.results()
    new = {
        "alerts": [
            {"layers": 7, "experts": 5, "milliseconds": 1.0, "milliseconds_judged": 2.0, "milliseconds_mean": 1.1}
        ],
        "collectives": [
            {
                "layers": 7,
                "experts": 5,
                "ranks": 2,
                "milliseconds": 1.0,
                "milliseconds_alone": 0.5,
                "ratio": {"median": 2.0, "low": 1.9, "high": 2.1},
                "collectives": 1,
                "collective_bytes": 280,
            }
        ],
    }
    old = {name: value for name, value in stored["overhead"].items() if name not in new}
    with_rows, without = (speed.page({**stored, "overhead": {**old, **more}}) for more in (new, {}))
    assert "## Alerts" in with_rows and "7 x 5" in with_rows
    assert "## Alerts" not in without and "7 x 5" not in without and "## Collectives" in without
    for name in old.keys() - {"command", "date", "hardware", "versions"}:
        with pytest.raises(KeyError):
            speed.page({**stored, "overhead": {key: value for key, value in old.items() if key != name}})


def test_a_ratio_says_which_way_is_quicker():
    assert speed.quicker({"low": 1.01, "high": 1.2}) == "the lab's way"
    assert speed.quicker({"low": 0.8, "high": 0.99}) == "the other way"
    assert speed.quicker({"low": 0.9, "high": 1.1}) == "undecided"
    row = {"compile_seconds": 30.0, "seconds_lab": 1.0, "ratio": {"median": 0.9, "low": 0.8, "high": 0.95}}
    assert speed.paid_back(row) == "300"
    assert speed.paid_back({**row, "ratio": {"median": 0.9, "low": 0.8, "high": 1.05}}) == ""


def test_other_programs_on_the_machine_are_told():
    paired = importlib.import_module("paired")
    others = paired.Others()
    cores = others.cores()
    assert cores is None or cores >= 0
    assert speed.company({"cores_of_others": None}) == speed.company({"cores_of_others": 0.0}) == []
    assert "1.3 cores" in speed.company({"cores_of_others": 1.3})[0]
