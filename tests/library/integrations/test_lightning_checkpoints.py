"""``BalanceCallback``: what checkpoints of Lightning bring back, and what a second fit goes on with."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_ranks import LR, Module, fit, loader, trainer
from plain_model import BOTH, PlainNet, Reference, assert_biases, assert_counts, assert_gradient, batches
from ranks import distance

from equipoise import UsageError
from equipoise.integrations.lightning import BalanceCallback

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_resuming_equals_never_having_stopped(tmp_path):
    """A checkpoint after two of four windows, in the midst of an epoch. One router has no slot for its bias."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = dict(accumulate_grad_batches=2, enable_checkpointing=True)
    fit(batches(8), callbacks=[saver], max_steps=2, **options)
    resume = str(tmp_path / "step=2.ckpt")
    _, callback, resumed = fit(batches(8), ckpt_path=resume, **options)
    _, _, whole = fit(batches(8)[:4] + batches(8)[:4], accumulate_grad_batches=2)  # the loader begins again
    assert callback.balance.num_windows == 4 and len(resumed.gradients) == 2
    for step in range(2):
        assert distance(resumed.gradients[step], whole.gradients[2 + step]) == 0
        assert all(torch.equal(resumed.biases[2 + step][n], whole.biases[2 + step][n]) for n in whole.biases[0])


class SavesMidway(lightning.Callback):
    """Saves in the midst of an accumulation."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_in_the_midst_of_an_accumulation_leaves_out_what_lightning_leaves_out(tmp_path, caplog):
    """Lightning does not save accumulated gradients: what is resumed has one batch in its first window."""
    path = str(tmp_path / "midway.ckpt")
    fit(batches(4), accumulate_grad_batches=2, callbacks=[SavesMidway(path)])
    saved = torch.load(path, weights_only=True)["callbacks"]["BalanceCallback"]["balance"]
    reference = Reference(PlainNet(), LR)
    reference.step([[batch] for batch in batches(4)[:2]], 1 / 2)
    assert_biases(saved["biases"], reference.biases)
    _, callback, watch = fit(batches(4), accumulate_grad_batches=2, ckpt_path=path)
    gradient = reference.step([[batches(4)[0]]], 1 / 2)  # the loader begins again
    assert_gradient(watch.gradients[0], gradient)
    assert_counts(callback.balance.load, reference.counts)
    assert_biases(callback.balance.biases, reference.biases)
    assert callback.balance.num_windows == 2


def _checkpoint(path, weights_only=False, **options):
    module, callback, _ = fit(batches(4), **options)
    saver = trainer([callback])
    saver.strategy.connect(module)
    saver.save_checkpoint(path, weights_only=weights_only)
    return module, callback


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_an_evaluation_routes_with_the_biases_of_its_checkpoint(tmp_path, run):
    """The second router has no slot: its biases are in the state of the callback alone."""

    class Evaluated(Module):
        test_step = Module.validation_step

        def predict_step(self, batch, batch_index):
            return self.model(**batch)

    _, trained = _checkpoint(tmp_path / "last.ckpt", max_epochs=10)
    callback, module = BalanceCallback(BOTH), Evaluated()
    getattr(trainer([callback]), run)(module, loader(batches(2)), ckpt_path=str(tmp_path / "last.ckpt"))
    assert callback.balance.biases.keys() == trained.balance.biases.keys()
    assert all(torch.equal(bias, trained.balance.biases[name]) for name, bias in callback.balance.biases.items())
    assert callback.balance.num_windows == trained.balance.num_windows
    trainer([callback]).fit(module, loader(batches(2)))  # the biases are no tensors of inference mode
    assert callback.balance.num_windows == trained.balance.num_windows + 2


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_without_the_balance_is_refused_unless_it_is_asked_for(tmp_path, weights_only):
    path = str(tmp_path / "plain.ckpt")
    module = Module()
    plain = trainer([] if not weights_only else [BalanceCallback(BOTH)])
    plain.fit(module, loader(batches(2)))
    plain.save_checkpoint(path, weights_only=weights_only)
    with pytest.raises(UsageError, match="a checkpoint must hold the state of BalanceCallback"):
        trainer([BalanceCallback(BOTH)]).validate(Module(), loader(batches(2)), ckpt_path=path)
    trainer([BalanceCallback(BOTH, fresh=True)]).validate(Module(), loader(batches(2)), ckpt_path=path)
    if not weights_only:  # Lightning itself refuses to resume from weights alone
        with pytest.raises(UsageError, match="a checkpoint must hold the state of BalanceCallback"):
            fit(batches(2), ckpt_path=path, max_epochs=2)
        again = Module()
        with pytest.raises(UsageError, match="fresh=True"):
            trainer([BalanceCallback(BOTH)], max_epochs=2).fit(again, loader(batches(2)), ckpt_path=path)
        callback = BalanceCallback(BOTH, fresh=True)
        trainer([callback], max_epochs=2).fit(again, loader(batches(2)), ckpt_path=path)  # as in a notebook
        assert callback.balance.num_windows == 2


def test_a_second_fit_goes_on_and_another_module_begins_anew():
    module, callback, _ = fit(batches(4))
    biases = callback.balance.biases
    trainer([callback]).fit(module, loader(batches(4)))
    assert callback.balance.num_windows == 8
    reference = Reference(PlainNet(), LR)
    for batch in batches(4) + batches(4):
        reference.step([[batch]], 1.0)
    assert_biases(callback.balance.biases, reference.biases)
    other = Module()
    trainer([callback]).fit(other, loader(batches(4)))
    assert callback.balance.num_windows == 4
    assert all(torch.equal(bias, biases[name]) for name, bias in callback.balance.biases.items())


class Interrupts(Module):
    def training_step(self, batch, batch_index):
        if batch_index == 3:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_index)


def test_a_fit_after_one_that_failed_counts_its_own_batches_only(caplog):
    callback, module = BalanceCallback(BOTH), Interrupts()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer([callback], accumulate_grad_batches=2).fit(module, loader(batches(4)))
    assert callback.balance.has_open_window
    trainer([callback], accumulate_grad_batches=2).fit(module, loader(batches(2)))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches(2))
    assert callback.balance.metrics()["tokens"] == tokens and callback.balance.num_windows == 2
