import math

import pytest
import reference
import torch
from torch.testing import assert_close

from equipoise import ZLoss
from equipoise.balancers import z_loss
from equipoise.routing import route


def test_z_loss_by_hand():
    # exp of the logits 1 + 3 and 2 + 2: log 4 both; masked: one of log 8
    logits = torch.tensor([[0.0, math.log(3)], [math.log(2), math.log(2)], [math.log(4), math.log(4)]])
    assert_close(z_loss(logits[:2]).item(), math.log(4) ** 2)
    assert_close(z_loss(logits, torch.tensor([0.0, 0.0, 1.0])).item(), math.log(8) ** 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_value_and_gradient_equal_the_reference(masked, dtype, atol):
    logits = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0]) if masked else None
    given = logits.to(dtype).requires_grad_()
    value = z_loss(given, mask)
    (gradient,) = torch.autograd.grad(value, given)
    flags = None if mask is None else mask.tolist()
    assert_close(value.item(), reference.z_loss(logits.tolist(), flags), rtol=0, atol=10 * atol)
    expected = torch.tensor(reference.z_loss_gradient(logits.tolist(), flags), dtype=dtype)
    assert_close(gradient, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [0, 3])
def test_without_tokens_loss_and_gradient_are_zero(rows):
    logits = torch.full((rows, 4), 1e4, requires_grad=True)
    value = z_loss(logits, torch.zeros(rows))
    value.backward()
    assert value == 0 and not logits.grad.any()
    assert z_loss(torch.zeros(0, 4)) == 0


def test_it_is_float32_and_finite_at_large_logits():
    logits = torch.tensor([[8e3, -8e3], [-8e3, -8e3]], dtype=torch.bfloat16)
    assert z_loss(logits).dtype == torch.float32
    assert z_loss(logits).isfinite()


def test_the_balancer_is_the_loss_and_needs_no_load():
    routing = route(torch.randn(6, 4), k=2, mask=torch.tensor([1.0, 1, 0, 1, 1, 1]))
    assert torch.equal(ZLoss(1e-3).loss(routing, None), z_loss(routing.logits, routing.mask))
    assert ZLoss().has_loss and not ZLoss().has_bias


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="mask must hold one number per token"):
        z_loss(torch.zeros(3, 2), torch.ones(4))
    with pytest.raises(ValueError, match=r"logits must have the shape \(tokens, experts\): got \(2, 3, 4\)"):
        z_loss(torch.zeros(2, 3, 4))
    for coefficient in (-1.0, math.nan, "small"):
        with pytest.raises(ValueError, match="coefficient must be"):
            ZLoss(coefficient)


def test_a_masked_token_may_hold_anything():
    logits, mask = torch.tensor([[0.0, 0.0], [math.nan, math.inf]], requires_grad=True), torch.tensor([1.0, 0.0])
    loss = z_loss(logits, mask)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) ** 2)
    assert logits.grad[0].tolist() == pytest.approx([math.log(2)] * 2) and not logits.grad[1].any()
