"""``loss_scale`` gives the losses their factor where no ticket can be added."""

import pytest
import torch
from torch.testing import assert_close
from windows import (
    LAYERS,
    SCOPES,
    assert_gradients_close,
    assert_tokens_counted,
    attach_tiny,
    clone_gradients,
    gradients_of_one_step,
    random_ids,
)

from equipoise import EquipoiseError


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
def test_loss_scale_replaces_tickets(checkpointing, scale):
    strategy = "+".join(f"lbl:scope={s},coefficient=0.3" for s in SCOPES)
    expected = gradients_of_one_step(strategy, 0.25)
    model, balance = attach_tiny(strategy, checkpointing=checkpointing)
    balance.loss_scale = scale
    (model(random_ids(rows=4)) * 0.25).backward()
    assert_gradients_close(clone_gradients(model), expected)
    balance.step()
    assert_tokens_counted(balance, 28)


def test_loss_scale_with_forwards_first_keeps_micro_batches_apart():
    strategy = "lbl:scope=micro_batch,coefficient=0.5+lbl:coefficient=0.5"
    model, balance = attach_tiny(strategy)
    balance.loss_scale = 0.5
    for loss in [model(random_ids(seed=s)) * 0.5 for s in range(2)]:
        loss.backward()
    expected, other = attach_tiny(strategy)
    losses = [(expected(random_ids(seed=s)) + other.loss()) * 0.5 for s in range(2)]
    sum(losses).backward()
    assert_gradients_close(clone_gradients(model), clone_gradients(expected))


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("order", ["sum", "first to last", "last to first"])
def test_loss_scale_finds_the_micro_batch_that_is_recomputed(checkpointing, order):
    """The backward of a sum of losses runs from the last to the first."""

    strategy, sizes = "lbl:scope=micro_batch,coefficient=0.5", (2, 2, 5)
    model, balance = attach_tiny(strategy, checkpointing=checkpointing)
    balance.loss_scale = 1.0
    losses = [model(random_ids(rows=rows, seed=seed)) for seed, rows in enumerate(sizes)]
    if order == "sum":
        sum(losses).backward()
    for loss in {"first to last": losses, "last to first": losses[::-1], "sum": ()}[order]:
        loss.backward()
    expected, other = attach_tiny(strategy)
    sum(expected(random_ids(rows=rows, seed=seed)) + other.loss() for seed, rows in enumerate(sizes)).backward()
    assert_gradients_close(clone_gradients(model), clone_gradients(expected))


def test_a_loss_for_logging_between_windows_does_not_merge_micro_batches():
    gradients = []
    for logged in (False, True):
        model, balance = attach_tiny("lbl:scope=micro_batch,coefficient=0.5")
        balance.loss_scale = 0.5
        for _ in range(2):
            model.zero_grad()
            for loss in [model(random_ids(seed=seed)) * 0.5 for seed in range(2)]:
                loss.backward()
            balance.step()
            if logged:
                assert float(balance.loss()) == 0.0
        gradients.append(clone_gradients(model))
    assert_gradients_close(*gradients)


def test_a_loss_scale_of_shape_one_is_a_number():
    expected = gradients_of_one_step("lbl:coefficient=0.3+z:coefficient=0.1", 0.25)
    model, balance = attach_tiny("lbl:coefficient=0.3+z:coefficient=0.1")
    balance.loss_scale = torch.tensor([0.25])
    (model(random_ids(rows=4)) * 0.25).backward()
    assert_gradients_close(clone_gradients(model), expected)


def test_autograd_grad_works_with_a_loss_scale():
    expected = gradients_of_one_step("lbl:coefficient=0.5")
    model, balance = attach_tiny("lbl:coefficient=0.5")
    weights = [model.get_submodule(name).weight for name in LAYERS]
    loss = model(random_ids(rows=4)) + balance.loss()
    with pytest.raises(EquipoiseError, match="torch.autograd.grad.*set balance.loss_scale"):
        torch.autograd.grad(loss, weights, retain_graph=True)
    balance.loss_scale = 1.0
    for name, gradient in zip(LAYERS, torch.autograd.grad(loss, weights), strict=True):
        assert_close(gradient, expected[f"{name}.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, torch.ones(2)])
def test_an_invalid_loss_scale_is_refused(value):
    _, balance = attach_tiny("lbl")
    with pytest.raises(ValueError, match="loss_scale must be a finite number"):
        balance.loss_scale = value
    assert balance.loss_scale is None


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
def test_a_loss_scale_may_be_a_function_of_the_tokens(checkpointing):
    """It is called once for each micro-batch. Here the loss is a mean over the tokens of the window."""
    strategy, rows = "+".join(f"lbl:scope={s},coefficient=0.3" for s in SCOPES), (2, 5)
    model, balance = attach_tiny(strategy, checkpointing=checkpointing)
    calls = []

    def of_tokens(num_tokens):
        calls.append(int(num_tokens))
        return num_tokens.double() / 49

    balance.loss_scale = of_tokens
    for seed, number in enumerate(rows):
        (0 * model(random_ids(rows=number, seed=seed))).backward()
    assert calls == [14, 35]
    expected, other = attach_tiny(strategy)
    for seed, number in enumerate(rows):
        loss = 0 * expected(random_ids(rows=number, seed=seed))
        (loss + number * 7 / 49 * other.loss()).backward()
    assert_gradients_close(clone_gradients(model), clone_gradients(expected))


@pytest.mark.parametrize("value", [float("nan"), "1", None, torch.ones(2)])
def test_a_function_that_gives_no_number_raises(value):
    model, balance = attach_tiny("lbl")
    balance.loss_scale = lambda num_tokens: value
    with pytest.raises(ValueError, match="the function loss_scale must give a finite number"):
        model(random_ids()).backward()
