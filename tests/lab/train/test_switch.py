"""A change of strategy during a run: what is handed over and recorded, and resuming around it."""

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


def test_the_strategy_changes_after_switch_at_and_not_before(tiny, new_watcher, tmp_path):
    options = {"micro": {"strategy": MICRO}, "global": {"strategy": GLOBAL}}
    options["switched"] = {"strategy": MICRO, "then": GLOBAL, "switch_at": 4}
    rows = {}
    for name, strategies in options.items():
        train(tiny(out=tmp_path / name, steps=8, save_model=False, **strategies), new_watcher())
        rows[name] = _rows(tmp_path / name, left_out=("seconds", "strategy"))
    assert rows["switched"][:4] == rows["micro"][:4]
    switched, unswitched = rows["switched"][4], rows["micro"][4]
    assert switched["loss"] == unswitched["loss"], "step 5 starts from the weights of the first strategy"
    assert switched["grad_norm"] != unswitched["grad_norm"], "its gradient comes from the second strategy"
    assert rows["switched"][5]["loss"] != rows["micro"][5]["loss"]


def test_a_switch_is_recorded(tiny, new_watcher):
    config = tiny(steps=5, strategy=MICRO, then="none", switch_at=2)
    result = train(config, new_watcher())
    facts = Run(config.out).config
    assert [row["strategy"] for row in _rows(config.out)] == [MICRO] * 2 + ["none"] * 3
    assert (facts["options"]["strategy"], facts["options"]["then"], facts["options"]["switch_at"]) == (MICRO, "none", 2)
    assert facts["strategy"] == result["strategy"] == f"{MICRO}, after step 2 none"


def test_notes_use_the_number_of_steps_of_each_strategy(tiny, new_watcher):
    watcher = new_watcher()
    train(tiny(steps=8, strategy="loss-free:rate=1e-5", then="loss-free:rate=2e-5", switch_at=3), watcher)
    assert [line[:10] for line in watcher.said[:2]] == ["In 3 steps", "In 5 steps"]


@pytest.mark.parametrize("arch", ["glm4_moe", "qwen3_moe"])
def test_a_switch_to_an_equivalent_strategy_changes_nothing(tiny, new_watcher, tmp_path, arch):
    """Bias, momentum and the position in the schedule are handed over exactly."""
    one = "loss-free:rate=0.02,rule=momentum,schedule=linear,zero_from=9"
    options = {"steps": 8, "arch": arch, "strategy": one}
    whole = train(tiny(out=tmp_path / "one", **options), new_watcher())
    switched = train(tiny(out=tmp_path / "two", **options, then=f"{one},momentum=0.5", switch_at=3), new_watcher())
    left_out = ("seconds", "strategy")
    assert _rows(tmp_path / "two", left_out=left_out) == _rows(tmp_path / "one", left_out=left_out)
    assert {**_without_times(switched), "strategy": one} == _without_times(whole)
    assert all(value.equal(_model(tmp_path / "one")[name]) for name, value in _model(tmp_path / "two").items())


@pytest.mark.parametrize("arch", ["glm4_moe", "qwen3_moe"])
def test_biases_continue_if_both_strategies_have_biases(tiny, new_watcher, arch):
    config = tiny(
        steps=6, arch=arch, strategy="loss-free:rule=sign,rate=0.01", then="lbl+loss-free:rule=sign", switch_at=3
    )
    train(config, new_watcher())
    maxima = [row["bias_max"] for row in _rows(config.out)]
    assert maxima[2] > 0.009
    assert maxima[3] == pytest.approx(maxima[2], abs=0.0021), "biases started again (a step is 0.001 minus its mean)"


def test_biases_are_removed_if_only_the_first_strategy_has_them_and_frozen_keeps_them(tiny, new_watcher, tmp_path):
    def slot(then):
        config = tiny(out=tmp_path / then, steps=4, strategy="loss-free:rate=0.01", then=then, switch_at=2)
        train(config, new_watcher())
        return _model(config.out)[SLOT], _rows(config.out)

    bias, rows = slot("none")
    assert not bias.any()
    assert "bias_max" in rows[1] and "bias_max" not in rows[2]
    bias, rows = slot("frozen")
    assert bias.abs().max() == pytest.approx(rows[1]["bias_max"])
    assert rows[1]["bias_max"] == rows[2]["bias_max"] == rows[3]["bias_max"] > 0


def test_biases_start_if_only_the_second_strategy_has_them(tiny, new_watcher):
    config = tiny(steps=4, strategy=MICRO, then="loss-free:rate=0.01", switch_at=2)
    train(config, new_watcher())
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
def test_a_run_stopped_before_at_or_after_the_switch_resumes_bit_for_bit(
    tiny, new_watcher, tmp_path, arch, strategy, then
):
    options = {"arch": arch, "strategy": strategy, "then": then, "switch_at": 4, "steps": 8, "checkpoint_every": 2}
    whole = train(tiny(out=tmp_path / "whole", **options), new_watcher())
    for stop_after, done in ((3, 2), (5, 4), (6, 4), (7, 6)):
        cut = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(out=cut, **options), new_watcher(stop_after))
        watcher = new_watcher()
        resumed = train(tiny(out=cut, **options, resume=True), watcher)
        assert watcher.done == done
        assert _without_times(resumed) == _without_times(whole)
        for log in ("steps", "loads", "evaluations"):
            assert _rows(cut, log) == _rows(tmp_path / "whole", log)
        assert all(value.equal(_model(tmp_path / "whole")[name]) for name, value in _model(cut).items())


def test_a_checkpoint_before_the_switch_replaces_a_damaged_one_after_it(tiny, new_watcher, tmp_path):
    options = {"strategy": "loss-free:rate=0.02,rule=momentum", "then": MICRO, "switch_at": 5, "steps": 9}
    whole = train(tiny(out=tmp_path / "whole", **options, checkpoint_every=4), new_watcher())
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=cut, **options, checkpoint_every=4), new_watcher(9))
    state = cut / "checkpoints" / "step-00000008" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    watcher = new_watcher()
    resumed = train(tiny(out=cut, **options, checkpoint_every=4, resume=True), watcher)
    assert any("step-00000008 cannot be read" in line for line in watcher.said)
    assert watcher.done == 4
    assert _without_times(resumed) == _without_times(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switch_at": 3}, "--switch-at needs --then: got no --then"),
        ({"then": "none"}, "--then needs --switch-at: got no --switch-at"),
        ({"then": "none", "switch_at": 0}, "must be from 1 to --steps - 1: got 0 with --steps 12"),
        ({"then": "none", "switch_at": 12}, "must be from 1 to --steps - 1: got 12 with --steps 12"),
        ({"then": "lbl", "switch_at": 3, "strategy": "lbl:coefficient=1e-2"}, "must be another strategy .* got lbl"),
        ({"then": "magic", "switch_at": 3}, "must be none, or made of"),
        ({"then": "loss-free:rule=multiplicative", "switch_at": 3}, "cannot replace each other"),
        ({"then": "loss-free+quantile", "switch_at": 3}, "one balancer may move the bias"),
    ],
)
def test_an_invalid_switch_is_refused_before_anything_is_written(tiny, new_watcher, options, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(**options), new_watcher())
    assert not tiny().out.exists()


def test_a_resumed_run_must_keep_its_switch(tiny, new_watcher):
    options = {"strategy": "none", "then": "lbl", "steps": 4}
    train(tiny(**options, switch_at=2), new_watcher())
    with pytest.raises(EquipoiseError, match="has switch_at=2, got 3"):
        train(tiny(**options, switch_at=3, resume=True), new_watcher())
    with pytest.raises(EquipoiseError, match="has then='lbl', got 'z'"):
        train(tiny(strategy="none", then="z", steps=4, switch_at=2, resume=True), new_watcher())
    assert json.loads((tiny().out / "result.json").read_text())["steps"] == 4


def test_the_second_strategy_has_no_effect_before_the_switch(tiny, new_watcher, tmp_path):
    train(tiny(out=tmp_path / "a", steps=2, strategy="none", save_model=False), new_watcher())
    train(tiny(out=tmp_path / "b", steps=3, strategy="none", then="lbl", switch_at=2, save_model=False), new_watcher())
    left_out = ("seconds", "strategy", "learning_rate")
    assert _rows(tmp_path / "a", left_out=left_out)[0] == _rows(tmp_path / "b", left_out=left_out)[0]
