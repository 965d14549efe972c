"""Resuming GRPO and KTO of TRL: what equals the unbroken training bit for bit, with TRL alone as the measure.

TRL keeps no rollouts in a checkpoint. So GRPO resumes equally only where a generation ends; what the balancing does
after any other checkpoint is held to plain loops.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback
from trl_runs import COEFFICIENT, Watch, by_sign, model_for, route, train

from equipoise.integrations import EquipoiseCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # FutureWarnings of TRL and Transformers about each other
SIGN = "loss-free:rule=sign,rate=1e-2"
STRATEGIES = {
    "loss-free": "loss-free:rule=momentum,rate=1e-2",
    "quantile": "quantile",
    "lbl": f"lbl:scope=global_batch,coefficient={COEFFICIENT}",
}
# The trainer, its options, and the step that the checkpoint is of. By default GRPO generates for each step.
AT_AN_END = {
    "kto": ("kto", {}, 2),
    "kto, precomputed": ("kto", dict(precompute_ref_log_probs=True), 1),
    "grpo": ("grpo", {}, 1),
    "grpo, a reference": ("grpo", dict(beta=0.1), 3),
    "grpo, two iterations": ("grpo", dict(num_iterations=2), 2),
    "grpo, two steps per generation": ("grpo", dict(steps_per_generation=4), 2),
}
USUAL = ("kto", "grpo", "grpo, two iterations")
WITHIN = {  # two steps share a generation
    "two iterations": (dict(num_iterations=2), 1),
    "two steps per generation": (dict(steps_per_generation=4), 1),
}
NOT_RESUMED = {"step_time", "num_tokens"}  # TRL measures the first anew, and KTO counts the second anew


class Experts(TrainerCallback):
    """Puts back all weights of a checkpoint, since the Trainer does not load experts (transformers #48805)."""

    def __init__(self, folder: Path, step: int | None = None):
        self.folder, self.step = folder, step

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.step is not None:
            model.load_state_dict(torch.load(self.folder / f"{self.step}.pt"))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        torch.save(model.state_dict(), self.folder / f"{state.global_step}.pt")


class Run:
    """Four steps with a checkpoint after each, or the rest of them after the checkpoint of a step of ``resumed``."""

    def __init__(self, kind, folder, callbacks, options, resumed=None, step=0, dtype=torch.float32):
        self.callback = next((one for one in callbacks if isinstance(one, EquipoiseCallback)), None)
        self.watch, self.folder, self.model = Watch(self.callback), folder, model_for(kind).to(dtype)
        options = dict(max_steps=4, save_strategy="steps", save_steps=1) | options
        checkpoint = resumed and str(resumed.folder / f"checkpoint-{step}")
        self.trainer = train(kind, self.model, [*callbacks, self.watch], folder, resume=checkpoint, **options)

    def rows(self, step):
        """What is logged after ``step``, without what plain TRL does not resume."""
        logged = [row for row in self.trainer.state.log_history if row["step"] > step and "loss" in row]
        return [{key: value for key, value in row.items() if key not in NOT_RESUMED} for row in logged]


def with_equipoise(kind, strategy, options, step, folder, dtype=torch.float32):
    """The unbroken training, and the one that is resumed after ``step``."""
    whole = Run(kind, folder / "whole", [EquipoiseCallback(strategy)], options, dtype=dtype)
    return whole, Run(kind, folder / "rest", [EquipoiseCallback(strategy)], options, whole, step, dtype)


def plain(kind, options, step, folder):
    """The same with TRL alone."""
    whole = Run(kind, folder / "plain", [Experts(folder)], options)
    copies = folder / "copies"
    copies.mkdir()
    (folder / f"{step}.pt").rename(copies / f"{step}.pt")
    return whole, Run(kind, folder / "plain_rest", [Experts(copies, step)], options, whole, step)


def are_equal(one, other):
    """Whether nested results hold the same, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one == other


def assert_resumed(whole, rest, step):
    assert len(rest.watch.gradients) == 4 - step
    for part in ("batches", "gradients", "weights", "load", "biases"):
        assert are_equal(getattr(rest.watch, part), getattr(whole.watch, part)[-len(getattr(rest.watch, part)) :]), part
    assert are_equal(rest.model.state_dict(), whole.model.state_dict())
    assert rest.rows(step) == whole.rows(step) and len(rest.rows(step)) == 4 - step


@pytest.mark.parametrize("case", USUAL)
def test_trl_alone_resumes_equally(case, tmp_path):
    kind, options, step = AT_AN_END[case]
    assert_resumed(*plain(kind, options, step, tmp_path), step)


@pytest.mark.parametrize(
    ("case", "strategy"),
    [(case, strategy) for case in AT_AN_END for strategy in STRATEGIES if case in USUAL or strategy == "loss-free"],
)
def test_resuming_equals_never_having_stopped(case, strategy, tmp_path):
    kind, options, step = AT_AN_END[case]
    whole, rest = with_equipoise(kind, STRATEGIES[strategy], options, step, tmp_path)
    assert_resumed(whole, rest, step)
    assert "equipoise/maxvio_batch" in rest.rows(step)[0]
    assert len(rest.watch.load) == 4 - step and whole.callback.balance.num_windows == 4
    state = whole.callback.balance.state_dict()
    assert are_equal(rest.callback.balance.state_dict(), state)
    has_moved = any(bias.any() for bias in whole.watch.biases[step - 1].values())
    assert has_moved == (strategy != "lbl")  # so the checkpoint has something to bring back
    assert strategy != "loss-free" or all(momentum.any() for momentum in state["state"]["momentum"].values())


@pytest.mark.parametrize("case", WITHIN)
def test_within_a_generation_it_resumes_as_trl_does(case, tmp_path):
    """TRL alone generates anew, so it does not resume equally. Counting leaves that as it is.

    If the first assertion on batches fails, TRL has begun to save rollouts: hold these cases to ``assert_resumed``, and
    say so in the handbook.
    """
    options, step = WITHIN[case]
    whole, alone = plain("grpo", options, step, tmp_path)
    assert are_equal(alone.watch.weights[0], whole.watch.weights[step])
    assert not are_equal(alone.watch.batches, whole.watch.batches[step:])
    _, rest = with_equipoise("grpo", "none", options, step, tmp_path)
    for part in ("batches", "gradients", "weights"):
        assert are_equal(getattr(rest.watch, part), getattr(alone.watch, part)), part
    assert are_equal(rest.model.state_dict(), alone.model.state_dict())


@pytest.mark.parametrize("case", WITHIN)
def test_within_a_generation_counts_and_biases_go_on_from_the_checkpoint(case, tmp_path):
    options, step = WITHIN[case]
    whole, rest = with_equipoise("grpo", SIGN, options, step, tmp_path, torch.float64)
    assert are_equal(rest.watch.weights[0], whole.watch.weights[step])
    biases, probe = whole.watch.biases[step - 1], model_for("grpo").double()
    assert all(bias.any() for bias in biases.values()) and rest.callback.balance.num_windows == 4
    for weights, batches, load, moved in zip(
        rest.watch.weights, rest.watch.batches, rest.watch.load, rest.watch.biases, strict=False
    ):
        probe.load_state_dict(weights)
        counts = {name: [0] * 8 for name in biases}
        for batch in batches:
            for name, (_, chosen) in route(probe, batch, biases).items():
                counts[name] = [one + other for one, other in zip(counts[name], chosen, strict=True)]
        assert {name: numbers.tolist() for name, numbers in load.items()} == counts
        for name, numbers in by_sign(counts, biases).items():
            torch.testing.assert_close(moved[name], torch.tensor(numbers), rtol=0, atol=1e-7)
        biases = moved
