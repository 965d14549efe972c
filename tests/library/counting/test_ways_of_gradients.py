"""The gradient of a loss goes one of three ways to the router: they are equal, and right.

At the scores, where autograd keeps them; by a function of ours, where a checkpoint or an offload keeps something else;
by operators, where a forward is traced. What is expected is autograd through the definition of the loss.
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import equipoise
from equipoise import LoadBalancingLoss, kernels
from equipoise.balancers import Balancer, ZLoss
from equipoise.load import expert_load
from equipoise.nn import Router
from equipoise.routers import tapped
from equipoise.routing import SCORE_FUNCTIONS, route

DIM, EXPERTS, K, ROWS, LENGTH = 6, 8, 2, 3, 5
COEFFICIENT = 0.3
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
PACKED = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
PACKED_NUMBERS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4])
ROW_NUMBERS = torch.arange(ROWS).repeat_interleave(LENGTH)


class _Traced(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


WAYS = {
    "at the scores": nullcontext,
    "function": lambda: saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
    "operators": _Traced,
}


class _Model(nn.Module):
    def __init__(self, score_function, layers=2, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList(Router(DIM, EXPERTS, K, score_function=score_function) for _ in range(layers))
        for router in self.routers:
            nn.init.normal_(router.weight)
        self.to(dtype)

    def forward(self, inputs_embeds, attention_mask=None, seq_idx=None):
        return sum((router(inputs_embeds)[1] * 0.7).square().sum() for router in self.routers)


def _hidden(seed=1, dtype=torch.float64):
    return torch.randn(ROWS, LENGTH, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _expected(model, hidden, loss, mask, numbers, load=None):
    """Gradients of the model's own loss, and of the balancing loss by its definition, at each router's weight."""
    total = model(hidden)
    for router in model.routers:
        routing = route(
            hidden.reshape(-1, DIM) @ router.weight.T,
            K,
            score_function=router.score_function,
            mask=None if mask is None else mask.reshape(-1),
        )
        routing = routing._replace(sequence_ids=numbers, num_sequences=6)
        total = total + COEFFICIENT * loss.loss(routing, None if loss.scope == "sequence" else load)
    return torch.autograd.grad(total, [router.weight for router in model.routers])


def _gradients(model):
    return [router.weight.grad for router in model.routers]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("scope", "packed"), [("sequence", False), ("sequence", True), ("micro_batch", False), ("global_batch", False)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_every_way_equals_autograd_through_the_definition(way, score_function, normalise, masked, scope, packed, fused):
    model, hidden = _Model(score_function), _hidden()
    loss = LoadBalancingLoss(coefficient=COEFFICIENT, scope=scope, normalise=normalise)
    mask = MASK if masked else None
    expected = _expected(model, hidden, loss, mask, PACKED_NUMBERS if packed else ROW_NUMBERS)
    balance = equipoise.attach(model, loss, fused=fused)
    if packed:
        balance.token_mask(mask, PACKED)
    with WAYS[way](), mock.patch.object(kernels, "_launch", wraps=kernels._launch) as launched:
        total = model(hidden, attention_mask=mask)
        (total + balance.loss()).backward()
    for found, wanted in zip(_gradients(model), expected, strict=True):
        assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert launched.called == fused


def _way_taken(model, hidden, context=nullcontext):
    balance = equipoise.attach(model, "lbl")
    with (
        mock.patch.object(tapped.EagerTap, "apply", wraps=tapped.EagerTap.apply) as function,
        mock.patch.object(tapped, "AtScores", wraps=tapped.AtScores) as at_scores,
        context(),
    ):
        (model(hidden) + balance.loss()).backward()
    balance.detach()
    return "function" * function.called + "at the scores" * at_scores.called


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scores_are_found_where_autograd_keeps_them(score_function, dtype):
    model = _Model(score_function, dtype=dtype)
    assert _way_taken(model, _hidden(dtype=dtype)) == "at the scores"
    assert _way_taken(model, _hidden(dtype=dtype), WAYS["function"]) == "function"


def _topk(probabilities, _):
    return probabilities.topk(K, -1)


def _gathered(probabilities, _):
    ids = probabilities.detach().topk(K, -1).indices
    weights = probabilities.gather(-1, ids)
    return (weights / weights.sum(-1, keepdim=True) * 2.5).to(torch.float64), ids


def _in_place(probabilities, _):
    weights, ids = probabilities.topk(K, -1)
    weights /= weights.sum(-1, keepdim=True)
    return weights, ids


def _of_chosen(probabilities, logits):
    values, ids = logits.topk(K, -1)
    return values.softmax(-1), ids


class _Written(nn.Module):
    """A router as models have them: softmax over all experts, and then what ``choose`` does."""

    def __init__(self, choose, cast=None, three=False):
        super().__init__()
        self.weight, self.choose, self.cast, self.three = nn.Parameter(torch.randn(EXPERTS, DIM)), choose, cast, three

    def forward(self, hidden):
        hidden = hidden if self.three else hidden.reshape(-1, DIM)
        logits = hidden @ self.weight.T
        probabilities = logits.softmax(-1) if self.cast is None else logits.to(self.cast).softmax(-1).float()
        weights, ids = self.choose(probabilities, logits)
        return logits, weights, ids


class _Block(nn.Module):
    def __init__(self, *arguments, **options):
        super().__init__()
        torch.manual_seed(0)
        self.router = _Written(*arguments, **options)

    def forward(self, inputs_embeds):
        return (self.router(inputs_embeds)[1] * 0.7).square().sum()


@pytest.mark.parametrize(
    ("block", "way"),
    [
        (lambda: _Block(_topk), "at the scores"),
        (lambda: _Block(_gathered), "at the scores"),
        (lambda: _Block(_in_place), "at the scores"),
        (lambda: _Block(_topk, three=True), "at the scores"),
        (lambda: _Block(_topk, cast=torch.float32), "at the scores"),
        (lambda: _Block(_of_chosen), "function"),  # autograd keeps a softmax of the chosen only
    ],
    ids=["topk", "gather", "in place", "three dimensions", "float32", "softmax of the chosen"],
)
def test_routers_as_models_have_them(block, way):
    model, hidden = block(), _hidden(dtype=torch.float32)
    weight = model.router.weight
    routing = route(hidden.reshape(-1, DIM) @ weight.T, K)
    total = model(hidden) + COEFFICIENT * LoadBalancingLoss().loss(routing, None)
    (expected,) = torch.autograd.grad(total, weight)
    assert _way_taken(model, hidden) == way
    weight.grad = None
    balance = equipoise.attach(model, LoadBalancingLoss(COEFFICIENT))
    (model(hidden) + balance.loss()).backward()
    assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_retained_graph_gives_the_gradient_each_time():
    model, hidden = _Model("sigmoid"), _hidden()
    loss = LoadBalancingLoss(COEFFICIENT)
    expected = _expected(model, hidden, loss, None, ROW_NUMBERS)
    balance = equipoise.attach(model, loss)
    total = model(hidden) + balance.loss()
    total.backward(retain_graph=True)
    total.backward()
    for found, wanted in zip(_gradients(model), expected, strict=True):
        assert_close(found, 2 * wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("way", ["at the scores", "function"])
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("loss", [LoadBalancingLoss(COEFFICIENT), ZLoss(COEFFICIENT)], ids=["lbl", "z"])
def test_a_second_derivative_takes_only_the_counts_for_constants(way, score_function, loss):
    model, hidden = _Model(score_function, layers=1), _hidden()
    weight = model.routers[0].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def second(total):
        (first,) = torch.autograd.grad(total, weight, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), weight)[0]

    def second_by_backward(total):
        total.backward(create_graph=True)
        first, weight.grad = weight.grad, None
        return torch.autograd.grad((first * direction).sum(), weight)[0]

    routing = route(hidden.reshape(-1, DIM) @ weight.T, K, score_function=score_function)
    expected = second(model(hidden) + COEFFICIENT * loss.loss(routing, None))
    balance = equipoise.attach(model, loss)
    with WAYS[way]():
        total = model(hidden)
        assert_close(second_by_backward(total + balance.loss()), expected, rtol=1e-8, atol=1e-11)
        balance.loss_scale = 1.0
        assert_close(second(model(hidden)), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_a_checkpoint_keeps_no_scores(reentrant, scope):
    model, hidden = _Model("sigmoid"), _hidden().requires_grad_()
    loss = LoadBalancingLoss(COEFFICIENT, scope=scope)
    expected = _expected(model, hidden, loss, None, ROW_NUMBERS)
    balance = equipoise.attach(model, loss)
    plain = model.forward
    model.forward = lambda inputs_embeds: checkpoint(plain, inputs_embeds, use_reentrant=reentrant)
    (model(inputs_embeds=hidden) + balance.loss()).backward()
    for found, wanted in zip(_gradients(model), expected, strict=True):
        assert_close(found, wanted, rtol=1e-9, atol=1e-12)


class _Half(Balancer):
    """A loss without slopes: half of the load-balancing loss, by autograd."""

    name, scope, coefficient = "half", "micro_batch", 2 * COEFFICIENT

    def loss(self, routing, load):
        return LoadBalancingLoss().loss(routing, load) / 2


@pytest.mark.parametrize("way", WAYS)
def test_losses_with_and_without_slopes_act_together(way):
    model, hidden = _Model("sigmoid"), _hidden()
    first, second = (LoadBalancingLoss(COEFFICIENT, scope=scope) for scope in ("micro_batch", "sequence"))
    by_two = [_expected(model, hidden, loss, None, ROW_NUMBERS) for loss in (first, second)]
    plain = torch.autograd.grad(model(hidden), [router.weight for router in model.routers])
    balance = equipoise.attach(model, _Half(), second)
    with WAYS[way]():
        (model(hidden) + balance.loss()).backward()
    for found, one, other, own in zip(_gradients(model), *by_two, plain, strict=True):
        assert_close(found, one + other - own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["at the scores", "function"])
def test_a_backward_under_autocast_is_not_rounded(way):
    found = []
    for under in (False, True):
        model, logits = _Model("sigmoid", layers=1, dtype=torch.float32), []
        balance = equipoise.attach(model, LoadBalancingLoss(COEFFICIENT))
        model.routers[0].register_forward_hook(lambda module, args, output, logits=logits: logits.append(output[0]))
        with WAYS[way]():
            total = 0 * model(_hidden(dtype=torch.float32)) + balance.loss()
            logits[0].retain_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=under):
                total.backward()
        found.append(logits[0].grad)
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("loss", [LoadBalancingLoss(COEFFICIENT), ZLoss(COEFFICIENT)], ids=["lbl", "z"])
@pytest.mark.parametrize("way", WAYS)
def test_a_looped_layer_has_one_mean_over_the_tokens_of_all_its_calls(way, loss):
    """Two calls of one router in a forward: counts of both, and N of both."""
    model, first, second = _Model("softmax", layers=1), _hidden(1), _hidden(2)
    router = model.routers[0]
    model.forward = lambda inputs_embeds: sum((router(h)[1] * 0.7).square().sum() for h in (inputs_embeds, second))
    both = torch.cat([first, second]).reshape(-1, DIM)
    by_definition = loss.loss(route(both @ router.weight.T, K), None)
    (expected,) = torch.autograd.grad(model.forward(first) + COEFFICIENT * by_definition, router.weight)
    balance = equipoise.attach(model, loss)
    with WAYS[way]():
        total = model(first)
        value = balance.loss()
        (total + value).backward()
    assert_close(router.weight.grad, expected, rtol=1e-9, atol=1e-12)
    assert_close(value.detach(), COEFFICIENT * by_definition.detach(), rtol=1e-12, atol=0)


def test_a_gradient_follows_counts_and_factors_that_have_changed():
    """Backwards of one micro-batch: before and after another was counted, and with another factor."""
    model, hidden, others = _Model("sigmoid"), _hidden(1), _hidden(2)
    weights = [router.weight for router in model.routers]
    loss = LoadBalancingLoss(COEFFICIENT)
    loads = []
    for batches in ([hidden], [hidden, others]):
        tokens = torch.cat(batches).reshape(-1, DIM)
        routed = [route(tokens @ weight.T, K, score_function="sigmoid").expert_ids for weight in weights]
        loads.append([expert_load(ids, EXPERTS) for ids in routed])

    def expected(load, factor):
        total = 0.0
        for weight, of_layer in zip(weights, load, strict=True):
            routing = route(hidden.reshape(-1, DIM) @ weight.T, K, score_function="sigmoid")
            total = total + factor * COEFFICIENT * loss.loss(routing, of_layer)
        return torch.autograd.grad(total, weights)

    balance = equipoise.attach(model, loss)
    value = model(hidden) * 0
    ticket = balance.loss()
    found = []
    for factor in (1.0, 2.0, None):
        if factor is None:  # another micro-batch
            model(others)
            balance.loss()
        model.zero_grad()
        (value + ticket * (factor or 1.0)).backward(retain_graph=True)
        found.append([weight.grad.clone() for weight in weights])
    for gradients, wanted in zip(
        found, (expected(loads[0], 1.0), expected(loads[0], 2.0), expected(loads[1], 1.0)), strict=True
    ):
        for gradient, one in zip(gradients, wanted, strict=True):
            assert_close(gradient, one, rtol=1e-9, atol=1e-12)


def test_a_gradient_without_tickets_follows_counts_that_have_changed():
    """The backward of a graph that is kept, with the same factor, before and after another micro-batch is counted."""
    model, hidden = _Model("sigmoid", layers=1), _hidden(1)
    weight, loss = model.routers[0].weight, LoadBalancingLoss(COEFFICIENT)
    first, both = (torch.cat(batches).reshape(-1, DIM) for batches in ([hidden], [hidden, _hidden(2)]))
    expected = []
    for tokens in (first, both):
        load = expert_load(route(tokens @ weight.T, K, score_function="sigmoid").expert_ids, EXPERTS)
        of_first = loss.loss(route(first @ weight.T, K, score_function="sigmoid"), load)
        expected += torch.autograd.grad(COEFFICIENT * of_first, weight)
    balance = equipoise.attach(model, loss)
    balance.loss_scale = 1.0
    total = model(hidden) * 0
    found = [*torch.autograd.grad(total, weight, retain_graph=True)]
    model(_hidden(2))
    found += torch.autograd.grad(total, weight)
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["at the scores", "function"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_that_is_changed_in_place_is_the_one_of_its_forward(way, dtype):
    """A static buffer: the next batch is written into the mask and the ids, perhaps before the backward."""
    model, loss = _Model("sigmoid"), LoadBalancingLoss(COEFFICIENT, scope="sequence")
    buffer, numbers = MASK.to(dtype), PACKED.clone()
    expected = [_expected(model, _hidden(1), loss, MASK, PACKED_NUMBERS)]
    expected.append(_expected(model, _hidden(2), loss, torch.ones_like(MASK), ROW_NUMBERS))
    balance = equipoise.attach(model, loss)
    with WAYS[way]():
        for number, wanted in enumerate(expected):
            total = model(_hidden(number + 1), attention_mask=buffer, seq_idx=numbers) + balance.loss()
            buffer.fill_(1)
            numbers.fill_(0)
            model.zero_grad()
            total.backward()
            for found, one in zip(_gradients(model), wanted, strict=True):
                assert_close(found, one, rtol=1e-9, atol=1e-12)


def test_scores_that_are_coarser_than_the_logits_are_not_taken():
    """A router in float64 whose softmax is in float32, as those of Transformers are."""
    model, hidden = _Block(lambda p, logits: logits.softmax(-1, dtype=torch.float32).topk(K, -1)), _hidden()
    model.double()
    assert _way_taken(model, hidden) == "function"
