"""Another strategy from some step on: what is handed over, what is recorded, and that a run can be stopped anywhere."""

import json

import pytest
import safetensors.torch

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.records import Run
from equipoise_lab.train.loop import train

MICRO, GLOBAL = "lbl:scope=micro_batch,coefficient=1", "lbl:scope=global_batch,coefficient=1"
SLOT = "model.layers.0.mlp.gate.e_score_correction_bias"


def _without_times(result):
    return {key: value for key, value in result.items() if key != "tokens_per_second"}


def _rows(folder, log="steps", left_out=("seconds",)):
    return [{k: v for k, v in row.items() if k not in left_out} for row in Run(folder).rows(log)]


def _model(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def test_the_strategy_changes_after_that_step_and_not_before(tiny, silent, tmp_path):
    options = {"micro": {"strategy": MICRO}, "global": {"strategy": GLOBAL}}
    options["switched"] = {"strategy": MICRO, "then": GLOBAL, "switch_at": 4}
    rows = {}
    for name, given in options.items():
        train(tiny(out=tmp_path / name, steps=8, save_model=False, **given), silent())
        rows[name] = _rows(tmp_path / name, left_out=("seconds", "strategy"))
    assert rows["switched"][:4] == rows["micro"][:4]
    fifth, if_not = rows["switched"][4], rows["micro"][4]
    assert fifth["loss"] == if_not["loss"], "the weights of step 5 are those of the first strategy"
    assert fifth["grad_norm"] != if_not["grad_norm"], "its gradient is not"
    assert rows["switched"][5]["loss"] != rows["micro"][5]["loss"]


def test_a_switch_is_recorded(tiny, silent):
    config = tiny(steps=5, strategy=MICRO, then="none", switch_at=2)
    result = train(config, silent())
    facts = Run(config.out).config
    assert [row["strategy"] for row in _rows(config.out)] == [MICRO] * 2 + ["none"] * 3
    assert (facts["options"]["strategy"], facts["options"]["then"], facts["options"]["switch_at"]) == (MICRO, "none", 2)
    assert facts["strategy"] == result["strategy"] == f"{MICRO}, after step 2 none"


def test_notes_are_of_the_steps_that_each_strategy_has(tiny, silent):
    watcher = silent()
    train(tiny(steps=8, strategy="loss-free:rate=1e-5", then="loss-free:rate=2e-5", switch_at=3), watcher)
    assert [line[:10] for line in watcher.said[:2]] == ["In 3 steps", "In 5 steps"]


@pytest.mark.parametrize("arch", ["glm4_moe", "qwen3_moe"])
def test_a_switch_to_what_acts_the_same_changes_nothing(tiny, silent, tmp_path, arch):
    """Bias, momentum and the place in the schedule are handed over exactly."""
    one = "loss-free:rate=0.02,rule=momentum,schedule=linear,zero_from=9"
    options = {"steps": 8, "arch": arch, "strategy": one}
    whole = train(tiny(out=tmp_path / "one", **options), silent())
    found = train(tiny(out=tmp_path / "two", **options, then=f"{one},momentum=0.5", switch_at=3), silent())
    left_out = ("seconds", "strategy")
    assert _rows(tmp_path / "two", left_out=left_out) == _rows(tmp_path / "one", left_out=left_out)
    assert {**_without_times(found), "strategy": one} == _without_times(whole)
    assert all(value.equal(_model(tmp_path / "one")[name]) for name, value in _model(tmp_path / "two").items())


@pytest.mark.parametrize("arch", ["glm4_moe", "qwen3_moe"])
def test_biases_go_on_where_both_hold_some(tiny, silent, arch):
    config = tiny(
        steps=6, arch=arch, strategy="loss-free:rule=sign,rate=0.01", then="lbl+loss-free:rule=sign", switch_at=3
    )
    train(config, silent())
    most = [row["bias_max"] for row in _rows(config.out)]
    assert most[2] > 0.009
    assert most[3] == pytest.approx(most[2], abs=0.0021), "they began anew: a step is 0.001, less its mean"


def test_biases_end_where_only_the_first_holds_some_and_frozen_keeps_them(tiny, silent, tmp_path):
    def slot(then):
        config = tiny(out=tmp_path / then, steps=4, strategy="loss-free:rate=0.01", then=then, switch_at=2)
        train(config, silent())
        return _model(config.out)[SLOT], _rows(config.out)

    ended, rows = slot("none")
    assert not ended.any()
    assert "bias_max" in rows[1] and "bias_max" not in rows[2]
    kept, rows = slot("frozen")
    assert kept.abs().max() == pytest.approx(rows[1]["bias_max"])
    assert rows[1]["bias_max"] == rows[2]["bias_max"] == rows[3]["bias_max"] > 0


def test_biases_begin_where_only_the_second_holds_some(tiny, silent):
    config = tiny(steps=4, strategy=MICRO, then="loss-free:rate=0.01", switch_at=2)
    train(config, silent())
    rows = _rows(config.out)
    assert "bias_max" not in rows[1]
    assert rows[2]["bias_max"] == pytest.approx(0.01)


PAIRS = [
    ("glm4_moe", MICRO, GLOBAL),
    ("glm4_moe", "loss-free:rate=0.01", "none"),
    ("qwen3_moe", "loss-free:rate=0.01", "none"),
    ("glm4_moe", "lbl", "loss-free:rate=0.02,rule=momentum+lbl"),
    ("qwen3_moe", "loss-free:rate=0.02,rule=momentum", "loss-free:rate=0.01,schedule=linear,zero_from=10"),
    ("glm4_moe", "none", "loss-free:rate=0.05,rule=multiplicative"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "strategy", "then"), PAIRS)
def test_a_run_that_was_stopped_before_at_or_after_the_switch_goes_on_bit_for_bit(
    tiny, silent, tmp_path, arch, strategy, then
):
    options = {"arch": arch, "strategy": strategy, "then": then, "switch_at": 4, "steps": 8, "checkpoint_every": 2}
    whole = train(tiny(out=tmp_path / "whole", **options), silent())
    for stop_after, done in ((3, 2), (5, 4), (6, 4), (7, 6)):
        cut = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(out=cut, **options), silent(stop_after))
        watcher = silent()
        resumed = train(tiny(out=cut, **options, resume=True), watcher)
        assert watcher.done == done
        assert _without_times(resumed) == _without_times(whole)
        for log in ("steps", "loads", "evaluations"):
            assert _rows(cut, log) == _rows(tmp_path / "whole", log)
        assert all(value.equal(_model(tmp_path / "whole")[name]) for name, value in _model(cut).items())


def test_of_a_damaged_checkpoint_after_the_switch_the_one_before_the_switch_is_used(tiny, silent, tmp_path):
    options = {"strategy": "loss-free:rate=0.02,rule=momentum", "then": MICRO, "switch_at": 5, "steps": 9}
    whole = train(tiny(out=tmp_path / "whole", **options, checkpoint_every=4), silent())
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=cut, **options, checkpoint_every=4), silent(9))
    for file in (cut / "checkpoints" / "step-00000008").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    watcher = silent()
    resumed = train(tiny(out=cut, **options, checkpoint_every=4, resume=True), watcher)
    assert any("step-00000008 is damaged" in line for line in watcher.said)
    assert watcher.done == 4
    assert _without_times(resumed) == _without_times(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switch_at": 3}, "--switch-at must go with --then: got no --then"),
        ({"then": "none"}, "--then must go with --switch-at: got no --switch-at"),
        ({"then": "none", "switch_at": 0}, "lie between 1 and --steps - 1: got 0 of 12"),
        ({"then": "none", "switch_at": 12}, "lie between 1 and --steps - 1: got 12 of 12"),
        ({"then": "lbl", "switch_at": 3, "strategy": "lbl:coefficient=1e-2"}, "must be another strategy .* got lbl"),
        ({"then": "magic", "switch_at": 3}, "must be none, or made of"),
        ({"then": "loss-free:rule=multiplicative", "switch_at": 3}, "cannot take each other's place"),
        ({"then": "loss-free+quantile", "switch_at": 3}, "one balancer may move the bias"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_before_anything_is_written(tiny, silent, options, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(**options), silent())
    assert not tiny().out.exists()


def test_a_switch_is_kept_by_a_run_that_goes_on(tiny, silent):
    options = {"strategy": "none", "then": "lbl", "steps": 4}
    train(tiny(**options, switch_at=2), silent())
    with pytest.raises(EquipoiseError, match="has switch_at=2, got 3"):
        train(tiny(**options, switch_at=3, resume=True), silent())
    with pytest.raises(EquipoiseError, match="has then='lbl', got 'z'"):
        train(tiny(strategy="none", then="z", steps=4, switch_at=2, resume=True), silent())
    assert json.loads((tiny().out / "result.json").read_text())["steps"] == 4


def test_what_takes_over_leaves_no_trace_before_it_does(tiny, silent, tmp_path):
    train(tiny(out=tmp_path / "a", steps=2, strategy="none", save_model=False), silent())
    train(tiny(out=tmp_path / "b", steps=3, strategy="none", then="lbl", switch_at=2, save_model=False), silent())
    left_out = ("seconds", "strategy", "learning_rate")
    assert _rows(tmp_path / "a", left_out=left_out)[0] == _rows(tmp_path / "b", left_out=left_out)[0]
