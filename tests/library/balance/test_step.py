"""``step()``: it moves the biases, closes the window, and warns of layers and losses without effect."""

import gc
import logging
import math
import weakref

import pytest
import reference
import torch
from models import DIM, EXPERTS, K
from torch import nn
from torch.testing import assert_close
from windows import LAYERS, assert_tokens_counted, attach_tiny, random_ids

from equipoise import EquipoiseError, attach
from equipoise.metrics import max_violation
from equipoise.nn import MoE


def test_step_moves_each_bias_by_the_rule_of_its_score_function():
    model, balance = attach_tiny("loss-free:rate=1e-2")
    assert all(not bias.any() for bias in balance.biases.values())
    biases = {name: [0.0] * EXPERTS for name in LAYERS}
    for seed in range(3):
        model(random_ids(seed=seed))
        model(random_ids(seed=seed + 10))
        balance.step()
        for name, rule in zip(LAYERS, (reference.sign_rule, reference.proportional_rule), strict=True):
            biases[name] = rule(biases[name], balance.load[name].tolist(), 1e-2, True)
    for name in LAYERS:
        assert balance.biases[name].dtype == torch.float32
        assert_close(balance.biases[name], torch.tensor(biases[name]), rtol=0, atol=1e-8)
    assert torch.equal(model.blocks[0].gate.e_score_correction_bias, balance.biases[LAYERS[0]])


def test_step_without_a_forward_raises():
    _, balance = attach_tiny("loss-free")
    with pytest.raises(EquipoiseError, match="attached routers must be called .*none was"):
        balance.step()


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1+lbl", "quantile+z", "lbl:pooling=previous"])
def test_a_layer_that_was_not_called_is_named_once_and_keeps_its_bias(strategy, caplog):
    model, balance = attach_tiny(strategy)
    (model(random_ids()) + balance.loss()).backward()
    balance.step()
    before, hidden = balance.biases, torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            (model.blocks[0](hidden).sum() + balance.loss()).backward()
            balance.step()
    assert caplog.text.count("step: blocks.1.gate got no token between two steps") == 1
    assert [int(load.sum()) for load in balance.load.values()] == [3 * K, 0]
    assert torch.equal(balance.biases[LAYERS[1]], before[LAYERS[1]])
    metrics = balance.metrics()
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["tokens"] == 3
    assert (
        metrics["maxvio_batch"]
        == metrics["maxvio_micro"]
        == pytest.approx(max_violation(balance.load[LAYERS[0]]).item())
    )
    (model(random_ids()) + balance.loss()).backward()
    balance.step()
    assert balance.metrics()["tokens"] == 14


def test_the_loss_metric_covers_only_layers_that_were_called():
    model, balance = attach_tiny("lbl:coefficient=1")
    hidden = torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(0))
    output = model.blocks[0](hidden)
    loss = balance.loss()
    (output.sum() + loss).backward()
    balance.step()
    assert balance.metrics()["load_balancing_loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("has_ticket", [False, True])
def test_a_loss_that_reaches_no_router_is_warned_about_once(has_ticket, checkpointed, num_tokens, caplog):
    """A block that computes its own weights ignores those of the router, which carry the gradient of the loss."""

    class Block(nn.Module):
        def __init__(self, uses_router_weights):
            super().__init__()
            self.router, self.uses_router_weights = MoE(DIM, 8, EXPERTS, K).router, uses_router_weights

        def forward(self, hidden):
            logits, weights, expert_ids = self.router(hidden)
            block_weights = logits.gather(-1, expert_ids).softmax(-1)
            return hidden * (weights if self.uses_router_weights else block_weights).sum(-1).view(*hidden.shape[:-1], 1)

    model = nn.Sequential(Block(True), Block(False), Block(True))
    balance = attach(model, "lbl")
    if not has_ticket:  # as in a pipeline
        balance.loss_scale = 1.0
    hidden = torch.randn(1, num_tokens, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            if checkpointed:
                output = torch.utils.checkpoint.checkpoint(model, hidden, use_reentrant=False)
            else:
                output = model(hidden)
            (output.sum() + balance.loss() if has_ticket else output.sum()).backward()
            balance.step()
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 and warnings[0].startswith("step: the balancing loss gave 1.router no gradient")


def test_a_router_that_is_not_trained_causes_no_warning(caplog):
    model, balance = attach_tiny("lbl")
    model.requires_grad_(False)
    leaf = torch.zeros((), requires_grad=True)
    with caplog.at_level(logging.WARNING, "equipoise"):
        (model(random_ids()) + leaf + balance.loss()).backward()
        balance.step()
    assert not caplog.records


@pytest.mark.parametrize("applied", [False, torch.tensor(False), torch.tensor(0.0)], ids=str)
def test_a_skipped_step_closes_the_window_and_moves_nothing(applied):
    model, balance = attach_tiny("loss-free:rate=0.1+lbl")
    (model(random_ids()) + balance.loss()).backward()
    before = balance.biases
    balance.step(applied)
    assert all(torch.equal(balance.biases[name], before[name]) for name in LAYERS)
    assert_tokens_counted(balance, 14)
    assert balance.state_dict()["num_windows"] == 1


@pytest.mark.parametrize("applied", [True, torch.tensor(True)], ids=str)
def test_an_applied_step_moves_the_biases(applied):
    model, balance = attach_tiny("loss-free:rate=0.1")
    model(random_ids())
    balance.step(applied)
    assert all(bias.any() for bias in balance.biases.values())
    assert torch.equal(model.blocks[0].gate.e_score_correction_bias, balance.biases[LAYERS[0]])


@pytest.mark.parametrize("applied", [None, 1.0, "yes", torch.ones(2)])
def test_an_invalid_applied_is_refused_before_the_window_closes(applied):
    model, balance = attach_tiny("loss-free:rate=0.1")
    model(random_ids())
    with pytest.raises(ValueError, match="applied must be true, false or a tensor of one number"):
        balance.step(applied)
    balance.step()
    assert any(bias.any() for bias in balance.biases.values())


@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1,rule=momentum", "quantile"])
def test_an_in_place_write_to_a_slot_becomes_the_bias(strategy):
    """A distributed checkpoint is read into the tensors of ``state_dict()`` like this."""
    bias = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.3, 0.1])
    model, expected = attach_tiny(strategy)
    model.blocks[0].gate.load_state_dict({**model.blocks[0].gate.state_dict(), "e_score_correction_bias": bias})
    other, balance = attach_tiny(strategy)
    other.blocks[0].gate.state_dict()["e_score_correction_bias"].copy_(bias)
    for trained, trained_balance in ((model, expected), (other, balance)):
        for _ in range(2):
            (trained(random_ids()) + trained_balance.loss()).backward()
            trained_balance.step()
    for name in LAYERS:
        assert torch.equal(balance.biases[name], expected.biases[name])
    assert torch.equal(other.blocks[0].gate.e_score_correction_bias, balance.biases[LAYERS[0]])
    other.blocks[0].gate.e_score_correction_bias.copy_(bias)
    assert torch.equal(balance.biases[LAYERS[0]], bias)
    before = balance.biases[LAYERS[0]].bfloat16().float()
    other.blocks[0].gate.e_score_correction_bias.copy_(before)  # the bias itself, rounded: it must stay as it was
    assert torch.equal(balance.biases[LAYERS[0]], bias)


def test_training_with_biases_evens_the_load_out():
    model, balance = attach_tiny("loss-free:rate=0.02,rule=sign")
    history = []
    for step in range(150):
        with torch.no_grad(), balance.counting():
            model(random_ids(rows=16, length=16, seed=step % 10))
        balance.step()
        history.append(balance.metrics()["maxvio_batch"])
    assert history[0] > 0.4, "the input is not skewed, so the test proves nothing"
    assert sum(history[-10:]) / 10 < 0.55 * history[0]  # chance alone gives 0.11 with 256 tokens


@pytest.mark.parametrize("strategy", ["lbl:scope=sequence", "lbl", "quantile", "loss-free", "z:coefficient=1e-3"])
def test_a_closed_window_but_the_last_is_freed_without_a_garbage_collection(strategy):
    """Training loops that collect by hand, as large runs do, would grow."""
    model, balance = attach_tiny(strategy)
    alive = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            (model(random_ids()) + balance.loss()).backward()
            alive += [weakref.ref(micro_batch) for micro_batch in balance._window.micro_batches]
            balance.step()
        assert [micro_batch() is not None for micro_batch in alive] == [False, False, False, True]
    finally:
        gc.enable()


def test_a_window_that_cannot_be_closed_here_is_closed_on_the_other_ranks_too(monkeypatch):
    model, balance = attach_tiny("quantile")
    model(random_ids()).backward()

    def fails():
        raise EquipoiseError("tokens of another forward")

    sent = []
    monkeypatch.setattr(balance._recorder, "settle", fails)
    monkeypatch.setattr(balance._window, "fail", lambda device, statistics: sent.append(statistics))
    with pytest.raises(EquipoiseError, match="tokens of another forward"):
        balance.step()
    assert len(sent) == 1 and len(sent[0].summed) > 0, "of the size that the others expect"
