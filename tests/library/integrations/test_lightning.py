"""``BalanceCallback``: a fit under ``lightning.Trainer`` gives what one process gives in float64, or is refused."""

import copy
import csv
import logging
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning_ranks import LR, Module, Watch, fit, loader, trainer
from plain_model import (
    BOTH,
    COEFFICIENT,
    RATE,
    PlainNet,
    Reference,
    assert_biases,
    assert_counts,
    assert_gradient,
    batches,
)
from ranks import distance

import equipoise
from equipoise import EquipoiseError, UsageError
from equipoise.integrations.lightning import BalanceCallback

BIASES = f"loss-free:rate={RATE},rule=sign"
pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def windows(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


def assert_as_in_float64(watch, data, accumulated, **options):
    """Every step: its gradient, the counts of its window, the biases after it."""
    reference = Reference(PlainNet(), LR, **options)
    in_float64 = []
    for step, window in enumerate(windows(data, accumulated)):
        gradient = reference.step([[batch] for batch in window], 1 / accumulated)
        assert_gradient(watch.gradients[step], gradient)
        assert_counts(watch.loads[step], reference.counts)
        assert_biases(watch.biases[step], reference.biases)
        in_float64.append(gradient)
    assert len(watch.gradients) == len(watch.biases) == len(in_float64)


# ---- gradients, counts and biases ----


@pytest.mark.parametrize("recomputes", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_fit_gives_the_gradient_the_counts_and_the_biases_of_one_process_in_float64(accumulated, recomputes):
    """Eight batches of uneven padding: with three a window the last has two, which Lightning divides by three too."""
    _, callback, watch = fit(batches(8), module=Module(recomputes), accumulate_grad_batches=accumulated)
    assert_as_in_float64(watch, batches(8), accumulated)
    assert [layer.name for layer in callback.balance.layers] == ["blocks.0.gate", "blocks.1.gate"]


def test_several_epochs_go_on_with_the_biases():
    _, callback, watch = fit(batches(5), accumulate_grad_batches=2, max_epochs=2)
    reference, data = Reference(PlainNet(), LR), batches(5)
    for window in windows(data, 2) + windows(data, 2):
        reference.step([[batch] for batch in window], 1 / 2)
    assert callback.balance.num_windows == 6
    assert_biases(callback.balance.biases, reference.biases)


def test_without_a_loss_the_training_is_the_same_bit_for_bit():
    """The strategy only counts: nothing is added to the loss."""
    balanced, _, _ = fit(batches(6), balancing="none")
    plain = Module()
    trainer([]).fit(plain, loader(batches(6)))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, balanced.state_dict()[name]), name


def test_clipping_acts_on_the_gradient_of_both_losses():
    module, callback, _ = fit(batches(4), gradient_clip_val=0.05)
    reference = Reference(PlainNet(), LR)
    for batch in batches(4):
        before = copy.deepcopy(reference)
        norm = sum(g.square().sum() for g in before.step([[batch]], 1.0).values()) ** 0.5
        reference.step([[batch]], 1.0, reaches=min(1.0, 0.05 / (float(norm) + 1e-6)))
    start = dict(PlainNet().named_parameters())
    moved = {n: (p - start[n]).detach().double() for n, p in module.model.named_parameters()}
    expected = {n: (p - start[n].double()).detach() for n, p in reference.model.named_parameters()}
    assert distance(moved, expected) < 1e-4  # of weights in float32, which move by 0.02
    assert_biases(callback.balance.biases, reference.biases)


class AsDict(Module):
    def training_step(self, batch, batch_index):
        return {"loss": self.model(**batch), "extra": 1}


def test_a_training_step_may_return_a_dict():
    _, _, watch = fit(batches(3), module=AsDict())
    assert_as_in_float64(watch, batches(3), 1)


class TwoForwards(Module):
    """As for a chosen and a rejected answer: one loss of two forwards."""

    def training_step(self, batch, batch_index):
        return self.model(**batch) + self.model(**batches(1, seed=7 + batch_index)[0])


def test_two_forwards_of_a_training_step_are_one_micro_batch(caplog):
    _, callback, _ = fit(batches(2), module=TwoForwards())
    last = batches(2)[1]["attention_mask"].sum() + batches(1, seed=8)[0]["attention_mask"].sum()
    assert callback.balance.metrics()["tokens"] == last


@pytest.mark.slow
@pytest.mark.parametrize("part", ["module", "model"])
def test_under_torch_compile(part):
    module = Module()
    if part == "model":
        module.model = torch.compile(module.model, backend="aot_eager")
    callback = BalanceCallback(BOTH)
    watch = Watch(callback)
    compiled = torch.compile(module, backend="aot_eager") if part == "module" else module
    trainer([callback, watch], accumulate_grad_batches=2).fit(compiled, loader(batches(4)))
    watch.gradients = [{n.removeprefix("_orig_mod."): g for n, g in step.items()} for step in watch.gradients]
    assert_as_in_float64(watch, batches(4), 2)


class Tuned(Module):
    learning_rate = LR

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate)


def test_a_search_for_the_learning_rate_is_not_counted(tmp_path):
    """It trains before the fit begins, and loads a checkpoint of its own."""
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    options = dict(enable_checkpointing=True, default_root_dir=tmp_path)
    _, _, watch = fit(batches(4), module=Tuned(), callbacks=[finder], **options)
    assert_as_in_float64(watch, batches(4), 1)


# ---- steps ----


class Skips(Module):
    """Some training steps return None."""

    def __init__(self, skipped, runs=True):
        super().__init__()
        self.skipped, self.runs = skipped, runs

    def training_step(self, batch, batch_index):
        if batch_index in self.skipped and not self.runs:
            return None
        loss = self.model(**batch)
        return None if batch_index in self.skipped else loss


def test_a_batch_without_a_loss_counts_and_a_window_without_one_moves_nothing():
    _, callback, watch = fit(batches(6), module=Skips({1, 4, 5}), balancing=BIASES, accumulate_grad_batches=2)
    assert [sum(load["blocks.0.gate"].tolist()) for load in watch.loads] == [
        2 * sum(int(batch["attention_mask"].sum()) for batch in window) for window in windows(batches(6), 2)
    ]
    assert all(torch.equal(watch.biases[2][name], watch.biases[1][name]) for name in watch.biases[1])
    assert not torch.equal(watch.biases[1]["blocks.0.gate"], watch.biases[0]["blocks.0.gate"])


def test_a_batch_that_is_skipped_before_its_forward_closes_no_window():
    _, callback, _ = fit(batches(4), module=Skips({1, 2}, runs=False), balancing=BOTH)
    assert callback.balance.num_windows == 2


class Overflowing(Module):
    """The first window overflows."""

    fused = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=LR, fused=self.fused)

    def training_step(self, batch, batch_index):
        return self.model(**batch) * (float("inf") if batch_index < 2 else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_closes_the_window_and_moves_nothing(fused):
    """A scaler does not call an optimizer whose step it skips; a fused one is called, and skips by itself."""
    module = Overflowing()
    module.fused = fused
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    _, callback, watch = fit(batches(6), module=module, plugins=[plugin], accumulate_grad_batches=2)
    assert callback.balance.num_windows == 3
    assert not any(bias.any() for bias in watch.biases[0].values())
    assert all(bias.any() for bias in watch.biases[1].values())
    tokens = [2 * sum(int(b["attention_mask"].sum()) for b in window) for window in windows(batches(6), 2)]
    assert [int(load["blocks.0.gate"].sum()) for load in watch.loads] == tokens


class CutShort(Module):
    """The epoch ends in the midst of an accumulation, so Lightning makes no step of its last batches."""

    def on_train_batch_start(self, batch, batch_index):
        return -1 if batch_index == 3 else None


def test_batches_that_an_epoch_leaves_over_move_nothing():
    """The next epoch zeroes their gradients."""
    _, callback, watch = fit(batches(6), module=CutShort(), accumulate_grad_batches=2, max_epochs=2)
    reference = Reference(PlainNet(), LR)
    for epoch in range(2):
        gradient = reference.step([[batch] for batch in batches(6)[:2]], 1 / 2)
        assert_gradient(watch.gradients[epoch], gradient)
    assert callback.balance.num_windows == 4
    assert_biases(callback.balance.biases, reference.biases)


class Lbfgs(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.model.parameters(), lr=LR)


def test_an_optimizer_that_calls_its_closure_twice_is_refused():
    with pytest.raises(EquipoiseError, match="must call its closure once in a step"):
        fit(batches(2), module=Lbfgs())


# ---- evaluation ----


def test_validation_and_the_sanity_check_count_nothing():
    """Validation runs after every batch, so in the midst of an accumulation too."""
    options = dict(accumulate_grad_batches=3, num_sanity_val_steps=2, val_check_interval=1)
    _, _, watch = fit(batches(8), validation=batches(3, seed=1), **options)
    assert_as_in_float64(watch, batches(8), 3)


# ---- manual optimization ----


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.callback = None

    def training_step(self, batch, batch_index):
        loss = self.model(**batch)
        if self.callback is not None:
            loss = loss + self.callback.balance.loss()
        self.manual_backward(loss / 2)
        if batch_index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_manual_optimization_with_a_loss_that_the_module_adds():
    module = Manual()
    module.callback = callback = BalanceCallback(BOTH, add_loss=False)
    watch = Watch(callback)
    trainer([callback, watch]).fit(module, loader(batches(6)))
    assert_as_in_float64(watch, batches(6), 2)


def test_manual_optimization_with_a_strategy_without_a_loss():
    _, callback, watch = fit(batches(6), module=Manual(), balancing=BIASES)
    assert callback.balance.num_windows == 3 and all(bias.any() for bias in watch.biases[0].values())


def test_manual_optimization_is_refused_with_a_loss_that_would_be_weighed_by_guess():
    with pytest.raises(UsageError, match="Lightning must make the backward"):
        fit(batches(2), module=Manual())


# ---- what is attached, logged and left behind ----


class Distilled(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = PlainNet(), PlainNet(seed=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=LR)

    def training_step(self, batch, batch_index):
        with torch.no_grad():
            target = self.teacher(**batch)
        return self.student(**batch) + 0 * target


def test_one_of_two_models_can_be_named():
    callback = BalanceCallback(BOTH, module="student")
    watch = Watch(callback)
    module = Distilled()
    module.model = module.student  # for the watch; the same module under two names
    trainer([callback, watch]).fit(module, loader(batches(3)))
    assert_as_in_float64(watch, batches(3), 1)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(UsageError, match="module must be the path of a module in the LightningModule: got 'pupil'"):
        trainer([BalanceCallback(BOTH, module="pupil")]).fit(Distilled(), loader(batches(3)))


def test_metrics_are_logged_after_each_window_and_as_often_as_the_trainer_logs(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    options = dict(logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    _, callback, watch = fit(batches(8), **options)
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["equipoise/maxvio_batch"]]
    loads = [watch.loads[1], watch.loads[3]]
    assert [float(row["equipoise/maxvio_batch"]) for row in rows] == pytest.approx(
        [float(equipoise.metrics.max_violation(load)) for load in loads], abs=1e-5
    )
    metrics, constants = callback.balance.metrics(), {"collectives", "collective_bytes"}
    assert {name for name in rows[0] if name.startswith("equipoise/")} == {
        f"equipoise/{name}" for name in metrics.keys() - constants
    }


def test_after_a_fit_the_module_and_the_trainer_can_be_copied_and_detach_leaves_them_as_they_were():
    module, callback, _ = fit(batches(2))
    copied = copy.deepcopy(module)
    before = copied.model(**batches(1)[0])
    biases = callback.detach()
    assert callback.balance is None and biases["blocks.1.gate"].any()
    assert type(module.model.blocks[1].gate) is type(PlainNet().blocks[1].gate)
    assert torch.isfinite(before)


def test_training_step_of_the_strategy_is_its_own_again():
    callback = BalanceCallback(BOTH)
    used = trainer([callback])
    used.fit(Module(), loader(batches(2)))
    assert "training_step" not in vars(used.strategy)


def test_problems_are_warnings(caplog):
    """All tokens choose the same two experts."""

    class Collapsed(Module):
        def __init__(self):
            super().__init__()
            for block in self.model.blocks:
                torch.nn.init.zeros_(block.gate.weight).requires_grad_(False)

    with caplog.at_level(logging.WARNING, "equipoise"):
        fit(batches(5) * 9, module=Collapsed(), balancing="none")
    assert any("collaps" in record.message or "dead" in record.message for record in caplog.records)


# ---- refusals ----


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        first, *others = self.model.parameters()
        return [torch.optim.SGD([first], lr=LR), torch.optim.SGD(others, lr=LR)]


def test_several_optimizers_are_refused():
    with pytest.raises(UsageError, match="a fit must have one optimizer, whose step moves the biases: got 2"):
        fit(batches(2), module=TwoOptimizers(), balancing=BIASES)


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=1e-2)])
def test_averages_of_the_weights_are_refused(averaging):
    with pytest.raises(UsageError, match="the weights that are trained must be those that are saved"):
        fit(batches(2), callbacks=[averaging()])


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (type("FSDPStrategy", (), {"handles_gradient_accumulation": False}), "FSDPStrategy flattens them"),
        (type("DeepSpeedStrategy", (), {"handles_gradient_accumulation": True}), "DeepSpeedStrategy does both"),
    ],
)
def test_strategies_under_which_it_would_be_wrong_are_refused(strategy, reason):
    with pytest.raises(UsageError, match=reason):
        BalanceCallback(BOTH).setup(SimpleNamespace(strategy=strategy(), callbacks=[]), None, "fit")


def test_a_callback_without_a_strategy_is_refused():
    with pytest.raises(UsageError, match="BalanceCallback must have a strategy"):
        BalanceCallback()


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(TypeError, match="of BalanceCallback must be one of attach .*got rate.*'loss-free:rate=1e-3'"):
        BalanceCallback("loss-free", rate=1e-3)
    assert BalanceCallback("loss-free", group=None, biases=None).balance is None


# ---- a training ----


def test_a_training_of_fifty_steps_evens_the_load():
    """Against one without balancing, from the same weights."""
    violations = {}
    for balancing in ("none", f"loss-free:rate=0.02,rule=sign+lbl:coefficient={COEFFICIENT}"):
        _, _, watch = fit(batches(5, rows=32) * 10, balancing=balancing)
        assert len(watch.loads) == 50
        last = {name: sum(load[name] for load in watch.loads[-5:]) for name in watch.loads[0]}
        violations[balancing] = equipoise.metrics.max_violation(last).item()
    print(violations)
    unbalanced, balanced = violations.values()
    assert balanced < unbalanced / 2, violations
