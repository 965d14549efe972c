"""The value of ``loss()``, its factor, and when its backward is refused."""

import pytest
import torch
from torch.testing import assert_close
from windows import (
    LAYERS,
    PADDING_MASK,
    assert_tokens_counted,
    attach_tiny,
    clone_gradients,
    gradients_of_one_step,
    loss_by_hand,
    random_ids,
    record_calls,
)

from equipoise import EquipoiseError, LoadBalancingLoss


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_equals_the_reference(masked):
    coefficients = {"sequence": 0.3, "micro_batch": 0.2, "global_batch": 0.5}
    model, balance = attach_tiny(*(LoadBalancingLoss(c, s) for s, c in coefficients.items()))
    calls = record_calls(model)
    model(random_ids(), PADDING_MASK if masked else None)
    mask = PADDING_MASK.reshape(-1).tolist() if masked else None
    expected = loss_by_hand(calls, coefficients, mask=mask, sequences=[0] * 7 + [1] * 7)
    assert float(balance.loss().detach()) == pytest.approx(expected, rel=1e-6)
    assert balance.loss() == 0, "a second loss() without a forward must be 0"


def test_the_loss_is_zero_before_a_forward_and_without_a_balancer_that_has_one():
    model, balance = attach_tiny("lbl")
    assert balance.loss() == 0
    model, balance = attach_tiny("loss-free")
    loss = model(random_ids())
    assert balance.loss() == 0 and balance.loss().dtype == torch.float32
    (loss + balance.loss()).backward()
    assert not any(b for b in [balance.metrics()])


def test_a_loss_taken_before_its_forward_raises():
    model, balance = attach_tiny("lbl")
    loss = balance.loss() + model(random_ids())
    with pytest.raises(EquipoiseError, match="between its forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("factor", [1 / 3, 1024.0, 65536.0 * 1.0, 0.0])
def test_the_factor_of_the_loss_reaches_the_router(factor):
    plain = gradients_of_one_step("lbl:coefficient=0.5")
    scaled = gradients_of_one_step("lbl:coefficient=0.5", factor)
    for name in plain:
        assert_close(scaled[name], plain[name] * factor, rtol=1e-5, atol=1e-6 * factor)


def test_an_autograd_loss_gets_its_coefficient_and_factor():
    """The gradient of the z-loss is linear in both."""
    without, whole = gradients_of_one_step("none"), gradients_of_one_step("z:coefficient=0.5")
    half, scaled = gradients_of_one_step("z:coefficient=0.25"), gradients_of_one_step("z:coefficient=0.5", 1 / 4)
    for name in LAYERS:
        name = f"{name}.weight"
        part = whole[name] - without[name]
        assert part.norm() > 1e-3
        assert_close(half[name] - without[name], part / 2, rtol=1e-4, atol=1e-6)
        assert_close(scaled[name], whole[name] / 4, rtol=1e-5, atol=1e-7)


def test_two_backwards_of_a_retained_graph_double_the_gradient():
    model, balance = attach_tiny("lbl:coefficient=0.5")
    loss = model(random_ids()) + balance.loss()
    loss.backward(retain_graph=True)
    once = clone_gradients(model)
    loss.backward()
    for name, gradient in clone_gradients(model).items():
        assert torch.equal(gradient, once[name] * 2)
    balance.step()
    assert_tokens_counted(balance, 14)


def test_a_second_backward_without_the_ticket_raises():
    model, balance = attach_tiny("lbl:coefficient=0.5")
    task = model(random_ids())
    (task + balance.loss()).backward(retain_graph=True)
    with pytest.raises(EquipoiseError, match="must be added"):
        task.backward()


def test_a_backward_after_step_is_refused():
    model, balance = attach_tiny("lbl")
    loss = model(random_ids()) + balance.loss()
    balance.step()
    with pytest.raises(EquipoiseError, match="must run before step"):
        loss.backward()
