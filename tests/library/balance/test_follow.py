"""``follow(optimizer)`` and gradient scalers."""

import pytest
import torch
from windows import (
    assert_gradients_close,
    assert_tokens_counted,
    attach_tiny,
    clone_gradients,
    gradients_of_one_step,
    random_ids,
)

from equipoise import EquipoiseError, attach


def test_follow_steps_with_the_optimizer():
    model, balance = attach_tiny("loss-free:rate=0.1+lbl")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = balance.follow(optimizer)
    for _ in range(2):
        (model(random_ids()) + balance.loss()).backward()
        optimizer.step()
    assert balance.state_dict()["num_windows"] == 2
    assert_tokens_counted(balance, 14)
    with pytest.raises(EquipoiseError, match="follow.. must be called once"):
        balance.follow(optimizer)
    with pytest.raises(EquipoiseError, match=r"follow\(optimizer\) calls it already"):
        balance.step()
    handle.remove()
    balance.follow(optimizer).remove()
    (model(random_ids()) + balance.loss()).backward()
    optimizer.step()
    assert balance.has_open_window


def test_detach_ends_what_follow_began():
    model, balance = attach_tiny("loss-free")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance.follow(optimizer)
    balance.detach()
    model(random_ids()).backward()
    optimizer.step()
    balance = attach(model, "loss-free")
    balance.follow(optimizer)
    model(random_ids()).backward()
    optimizer.step()
    assert balance.num_windows == 1


def test_follow_steps_once_if_the_step_of_an_optimizer_calls_its_base_class():
    class Inherited(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, balance = attach_tiny("loss-free:rate=0.1")
    torch.optim.SGD(model.parameters(), lr=0.1)  # after this, torch calls the hooks in the base class's step too
    optimizer = Inherited(model.parameters(), lr=0.1)
    balance.follow(optimizer)
    for _ in range(2):
        (model(random_ids()) + balance.loss()).backward()
        optimizer.step()
    assert balance.state_dict()["num_windows"] == 2


def test_follow_ignores_the_step_by_which_torch_creates_optimizer_state():
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, balance = attach_tiny("loss-free:rate=0.1")
    optimizer = torch.optim.AdamW(model.parameters())
    balance.follow(optimizer)
    get_state_dict(model, optimizer)
    (model(random_ids()) + balance.loss()).backward()
    optimizer.step()
    assert balance.state_dict()["num_windows"] == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_a_grad_scaler_moves_nothing(fused):
    """A scaler skips the step of a plain optimizer. It calls a fused optimizer, whose kernel skips the step itself."""
    model, balance = attach_tiny("loss-free:rate=0.1")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), model.embed.weight.detach().clone()
    balance.follow(optimizer)
    for factor in (float("inf"), 1.0):
        scaler.scale(model(random_ids()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [bool(bias.any()) for bias in balance.biases.values()]
        assert moved == [factor == 1.0] * 2 and torch.equal(before, model.embed.weight) == (factor != 1.0)
        optimizer.zero_grad()
    # nobody called step(applied=False) for the plain optimizer, so both iterations are one window
    assert balance.state_dict()["num_windows"] == (2 if fused else 1)


def test_follow_steps_with_an_optimizer_whose_step_is_compiled():
    torch._dynamo.reset()
    model, balance = attach_tiny("loss-free:rate=0.1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance.follow(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for number in (1, 2):
        model(random_ids()).backward()
        step()
        assert balance.state_dict()["num_windows"] == number
    torch._dynamo.reset()


def test_follow_refuses_an_optimizer_without_hooks():
    class Prepared(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model, balance = attach_tiny("loss-free:rate=0.1")
    with pytest.raises(TypeError, match="got Prepared. Pass the one that it wraps"):
        balance.follow(Prepared(torch.optim.SGD(model.parameters())))


def test_follow_refuses_a_wrapper_that_shares_the_hooks():
    """As LightningOptimizer: a subclass of the optimizer's class with the attributes of the optimizer."""

    class Wrapper(torch.optim.SGD):
        def __init__(self, optimizer):
            self.__dict__ |= optimizer.__dict__
            self.optimizer = optimizer

    model, balance = attach_tiny("loss-free:rate=0.1")
    with pytest.raises(TypeError, match=r"got Wrapper. Pass the one that it wraps, as optimizer\.optimizer"):
        balance.follow(Wrapper(torch.optim.SGD(model.parameters())))


def test_a_grad_scaler_does_not_change_the_gradient():
    expected = gradients_of_one_step("loss-free:rate=0.1+lbl:coefficient=0.5")
    model, balance = attach_tiny("loss-free:rate=0.1+lbl:coefficient=0.5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(random_ids(rows=4)) + balance.loss()).backward()
    scaler.unscale_(optimizer)
    assert_gradients_close(clone_gradients(model), expected)
    scaler.step(optimizer)
    balance.step()
