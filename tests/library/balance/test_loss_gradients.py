"""The gradients of the losses equal those of the reference, for any cut into micro-batches."""

import pytest
import reference
import torch
from models import DIM, EXPERTS, K, tiny_lm
from torch import nn
from torch.testing import assert_close
from windows import (
    LAYERS,
    SCOPES,
    SCORE_FUNCTIONS,
    assert_gradients_close,
    attach_tiny,
    clone_gradients,
    random_ids,
    record_calls,
)

from equipoise import LoadBalancingLoss, attach


def test_a_float64_model_has_a_float64_factor():
    """The design promises 1e-12 in float64 (section 6). A factor of 1/3 in float32 would be off by 1e-8."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = tiny_lm().blocks[1].gate.double()

        def forward(self, x):
            return self.gate(x)[1].sum() * 0

    model = Mixed().train()
    balance = attach(model, LoadBalancingLoss(0.7, "micro_batch"))
    x = torch.randn(10, DIM, generator=torch.Generator().manual_seed(0)).double()
    ((model(x) + balance.loss()) / 3).backward()
    logits = (x @ model.gate.weight.T).detach()
    ids = logits.softmax(-1).topk(K).indices
    rows = reference.load_balancing_gradient(logits.tolist(), reference.load(ids.tolist(), EXPERTS), "softmax")
    expected = torch.tensor(rows, dtype=torch.float64).T @ x * 0.7 / 3
    assert_close(model.gate.weight.grad, expected, rtol=0, atol=1e-12)
    model.zero_grad()
    y = x[:4] * 2
    loss = model(x) + model(y)  # two calls, 10 and 4 tokens, in one micro-batch
    (loss + balance.loss()).backward()
    both = torch.cat([x, y])
    logits = (both @ model.gate.weight.T).detach()
    ids = logits.softmax(-1).topk(K).indices
    rows = reference.load_balancing_gradient(logits.tolist(), reference.load(ids.tolist(), EXPERTS), "softmax")
    expected = torch.tensor(rows, dtype=torch.float64).T @ both * 0.7
    assert_close(model.gate.weight.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_two_forwards_in_a_micro_batch_equal_one_with_all_their_tokens(scope):
    strategy = f"lbl:scope={scope},coefficient=0.5"
    model, balance = attach_tiny(strategy)
    ids = random_ids(rows=4)
    # the task loss is a mean over rows of equal length, so the whole is the mean of its parts, weighted by rows
    loss = (model(ids[:3]) * 3 + model(ids[3:])) / 4
    value = balance.loss()
    (loss + value).backward()
    expected, other = attach_tiny(strategy)
    whole = expected(ids)
    whole_value = other.loss()
    (whole + whole_value).backward()
    assert_gradients_close(clone_gradients(model), clone_gradients(expected))
    if scope != "micro_batch" and scope != "global_batch":  # their values use the counts known at each call
        assert_close(value, whole_value, rtol=1e-6, atol=0)


def test_previous_pooling_uses_the_last_windows_share():
    strategy = "lbl:coefficient=0.5,pooling=previous"
    model, balance = attach_tiny(strategy)
    plain = tiny_lm()
    plain(random_ids()).backward()
    loss = model(random_ids()) + balance.loss()
    loss.backward()
    # an even share: E * sum_e P_e / E = 1 per layer, a constant, so the gradient is 0 up to rounding
    assert float(loss.detach()) == pytest.approx(float(plain(random_ids()).detach()) + 2 * 0.5, rel=1e-6)
    assert_gradients_close(clone_gradients(model), clone_gradients(plain), 1e-6)
    balance.step()
    last = {name: load.tolist() for name, load in balance.load.items()}
    model.zero_grad()
    calls = record_calls(model)
    (model(random_ids(seed=1)) * 0 + balance.loss()).backward()
    for name in LAYERS[1:]:  # the last router gets no gradient from a later one
        logits = calls[name][0][0]
        rows = reference.load_balancing_gradient(logits.double().tolist(), last[name], SCORE_FUNCTIONS[name])
        gradient = model.get_submodule(name).weight.grad
        inputs = torch.linalg.lstsq(model.get_submodule(name).weight.detach(), logits.T).solution.T  # DIM > EXPERTS
        assert gradient.shape == (EXPERTS, DIM) and inputs.shape == (14, DIM)
        weight = model.get_submodule(name).weight.detach()
        expected = 0.5 * torch.tensor(rows).T @ logits  # (grad_W) W^T = sum_t g_t z_t^T
        assert_close(gradient @ weight.T, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_uneven_micro_batches_equal_the_reference(scope):
    shapes = [(2, 7), (1, 4), (3, 5)]
    micro_batches = [random_ids(r, n, seed=i) for i, (r, n) in enumerate(shapes)]
    weights = [0.5, 0.2, 0.3]
    model, balance = attach_tiny(LoadBalancingLoss(0.7, scope))
    calls = _logit_gradients(model, balance, micro_batches, weights)
    for name in LAYERS:
        parts = [{"logits": z.double().tolist(), "expert_ids": ids.tolist()} for z, ids, _ in calls[name]]
        if scope == "global_batch":
            expected = reference.global_batch_gradients(parts, K, SCORE_FUNCTIONS[name], 0.7, weights)
        else:
            expected = []
            for part, weight, (rows, length) in zip(parts, weights, shapes, strict=True):
                if scope == "micro_batch":
                    (gradient,) = reference.global_batch_gradients([part], K, SCORE_FUNCTIONS[name], 0.7, [weight])
                else:
                    sequences = [t // length for t in range(rows * length)]
                    gradient = reference.sequence_gradient(
                        part["logits"], part["expert_ids"], sequences, SCORE_FUNCTIONS[name]
                    )
                    gradient = [[0.7 * weight * value for value in row] for row in gradient]
                expected.append(gradient)
        for (_, _, logit_gradient), rows in zip(calls[name], expected, strict=True):
            assert_close(logit_gradient, torch.tensor(rows), rtol=0, atol=1e-7)  # float32, values of 1e-2


def _logit_gradients(model, balance, micro_batches, weights):
    """By layer and micro-batch, (logits, ids, gradient of the logits), taken at the output of the linear map."""
    calls_by_layer = {name: [] for name in LAYERS}
    original = torch.nn.functional.linear
    outputs = []

    def linear(*args, **kwargs):
        output = original(*args, **kwargs)
        if output.shape[-1] == EXPERTS and output.requires_grad:
            output.retain_grad()
            outputs.append(output)
        return output

    torch.nn.functional.linear = linear
    # detached, so that the second router's loss does not reach the first; the task's gradient is multiplied by 0
    model.blocks[1].gate.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    try:
        for name in LAYERS:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: calls_by_layer[name].append([outputs[-1], output[2]])
            )
        losses = [
            (model(ids) * 0 + balance.loss()) * weight for ids, weight in zip(micro_batches, weights, strict=True)
        ]
    finally:
        torch.nn.functional.linear = original
    sum(losses).backward()
    return {name: [(z.detach(), ids, z.grad) for z, ids in calls] for name, calls in calls_by_layer.items()}


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_losses_weighted_by_tokens_equal_one_big_micro_batch(scope):
    strategy = f"loss-free:rate=0.1+lbl:scope={scope},coefficient=0.5"
    ids, lengths = random_ids(rows=4), torch.tensor([7, 2, 4, 6])
    mask = (torch.arange(7) < lengths[:, None]).long()
    total = int(mask.sum())
    model, balance = attach_tiny(strategy)
    losses = []
    for rows in (slice(0, 1), slice(1, 4)):
        tokens = mask[rows].sum()
        ce_sum = model(ids[rows], mask[rows]) * tokens
        assert balance.num_tokens == tokens
        losses.append((ce_sum + balance.num_tokens * balance.loss()) / total)
    sum(losses).backward()
    balance.step()
    big, big_balance = attach_tiny(strategy)
    loss = big(ids, mask) + big_balance.loss()
    loss.backward()
    big_balance.step()
    assert_gradients_close(clone_gradients(model), clone_gradients(big))
    for name in LAYERS:
        assert torch.equal(balance.load[name], big_balance.load[name])
        assert torch.equal(balance.biases[name], big_balance.biases[name])
    if scope == "sequence":  # the global value depends on the counts known at each micro-batch
        assert_close(sum(losses), loss, rtol=1e-6, atol=0)


def test_a_backward_under_autocast_gives_the_same_gradient():
    gradients = []
    for under in (False, True):
        model, balance = attach_tiny("lbl:coefficient=1+z:coefficient=1e-2")
        last, logits = model.get_submodule(LAYERS[-1]), []  # the gradient of no other router reaches its logits
        last.register_forward_hook(lambda module, args, output, logits=logits: logits.append(output[0]))
        loss = 0 * model(random_ids()) + balance.loss()
        logits[0].retain_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            loss.backward()
        gradients.append(logits[0].grad)
    assert gradients[0].any() and torch.equal(*gradients)
