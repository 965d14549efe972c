"""Recomputation of every kind: not counted, and its gradient belongs to the right micro-batch.

The table of compilers, checkpoints and ranks for a plain model is in ``test_grid.py``.
"""

import itertools
from functools import cache

import pytest
import torch
from block_net import (
    ALL_MASKED,
    BATCHES,
    ORDERS,
    PADDED_RIGHT,
    STRATEGY,
    TOKENS,
    Batch,
    assert_same_outcome,
    block,
    block_net,
    count_router_runs,
    exact_default_window,
    exact_window,
    must_recompute,
    prefer_recompute,
    run_window,
    save_matmuls,
    save_router,
    save_tap,
    sums,
)
from models import DIM, K
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from windows import assert_gradients_close, clone_gradients, random_ids

from equipoise import EquipoiseError, attach

CHECKPOINTING = {
    "saves the matrix products": [save_matmuls] * 3,
    "saves the router": [save_router] * 3,
    "saves the tap": [save_tap] * 3,
    "prefers to recompute": [prefer_recompute] * 3,
    "must recompute": [must_recompute] * 3,
    "the first layer": ["non_reentrant", None, None],
    "the second layer": [None, "non_reentrant", None],
    "the second layer, reentrant": [None, "reentrant", None],
    "a policy beside a checkpoint": [save_router, "non_reentrant", None],
    "nested": ["nested_non_reentrant"] * 3,
    "nested, reentrant": ["nested_reentrant"] * 3,
    "nested, mixed": ["mixed"] * 3,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", CHECKPOINTING)
def test_recomputation_of_any_part_is_not_counted_and_finds_its_micro_batch(part, order):
    net = block_net()
    balance = attach(net, STRATEGY)
    net.checkpointing = CHECKPOINTING[part]
    runs = count_router_runs(net)
    assert_same_outcome(run_window(net, balance, BATCHES, order), exact_default_window(order))
    assert sums(exact_default_window(order).loads) == [K * TOKENS] * 2
    assert len(runs) > 2 * len(BATCHES), "nothing was recomputed, so the test proves nothing"


COMPILED = [
    "saves the matrix products",
    "saves the router",
    "the second layer, reentrant",
    "nested",
]


@pytest.mark.parametrize("part", COMPILED)
def test_recomputation_in_a_compiled_graph_is_not_counted(part):
    torch._dynamo.reset()
    net = block_net()
    balance = attach(net, STRATEGY)
    net.checkpointing = CHECKPOINTING[part]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for order in ORDERS:
        assert_same_outcome(run_window(net, balance, ALL_MASKED, order, compiled), exact_default_window(order))


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_recomputation_by_the_compiler_is_not_counted(budget):
    torch._dynamo.reset()
    net = block_net()
    balance = attach(net, STRATEGY)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = torch.compile(net, backend="aot_eager_decomp_partition", fullgraph=True)
        for order in ORDERS:
            assert_same_outcome(run_window(net, balance, ALL_MASKED, order, compiled), exact_default_window(order))


@pytest.mark.parametrize("order", ORDERS)
def test_activations_saved_on_the_cpu_keep_their_micro_batch(order):
    net = block_net()
    balance = attach(net, STRATEGY)
    net.checkpointing = [None, "non_reentrant", None]
    with torch.autograd.graph.save_on_cpu():
        outcome = run_window(net, balance, BATCHES, order)
    assert_same_outcome(outcome, exact_default_window(order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_model_may_be_one_checkpoint(reentrant, order):
    """The model's hooks run again in the backward. They must not touch the mask of the next micro-batch."""
    net = block_net()
    balance = attach(net, STRATEGY)
    tie = torch.zeros(1, requires_grad=True)  # a reentrant checkpoint needs an input with a gradient

    def forward(ids, mask):
        return checkpoint(lambda t, *args: net(*args) + 0 * t.sum(), tie, ids, mask, use_reentrant=reentrant)

    assert_same_outcome(run_window(net, balance, BATCHES, order, forward), exact_default_window(order))
    net.zero_grad()
    loss = (forward(random_ids(seed=1), None) + balance.loss()) / 3
    balance.token_mask(PADDED_RIGHT)  # of the next micro-batch, before the backward of this one
    loss.backward()
    net(random_ids(seed=2))
    assert balance.num_tokens == 8
    balance.loss()
    balance.step()
    assert sums(balance.load) == [K * (14 + 8)] * 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", save_router])
def test_checkpointing_may_be_switched_between_micro_batches(kind, order):
    for pattern in itertools.product((False, True), repeat=3):
        net = block_net()
        balance = attach(net, STRATEGY)

        def switch(number, net=net, pattern=pattern):
            net.checkpointing = [kind if pattern[number] else None] * 3

        assert_same_outcome(run_window(net, balance, BATCHES, order, before=switch), exact_default_window(order))


UNEVEN_BATCHES = [
    Batch(random_ids(3, 5, 4)),
    Batch(random_ids(1, 4, 5)),
    Batch(random_ids(2, 7, 6), PADDED_RIGHT),
    Batch(random_ids(4, 3, 7)),
]


@cache
def exact_uneven_window(order):
    return exact_window(block_net(), UNEVEN_BATCHES, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("pattern", ["1010", "0101", "1100", "0001"])
def test_some_of_the_uneven_micro_batches_may_be_checkpointed(pattern, kind, order):
    net = block_net()
    balance = attach(net, STRATEGY)

    def switch(number):
        net.checkpointing = [kind if pattern[number] == "1" else None] * 3

    assert_same_outcome(run_window(net, balance, UNEVEN_BATCHES, order, before=switch), exact_uneven_window(order))
    assert sums(exact_uneven_window(order).loads) == [K * (15 + 4 + 8 + 12)] * 2


def test_uneven_micro_batches_share_one_dynamic_graph():
    torch._dynamo.reset()
    net = block_net()
    balance = attach(net, STRATEGY)
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    for order in ORDERS:
        assert_same_outcome(run_window(net, balance, UNEVEN_BATCHES, order, compiled), exact_uneven_window(order))


class Stage(torch.nn.Module):
    """A stage of a pipeline: its gradient is taken for its inputs first, and for its weights later."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([block("sigmoid"), block("softmax")])

    def forward(self, x):
        for layer in self.blocks:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()


def _inputs(seed):
    return torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_backward_that_runs_twice_has_the_same_gradient_twice(backend):
    """Zero-bubble schedules split a backward. In a compiled graph each half recomputes and runs all of it."""
    torch._dynamo.reset()
    strategy = "lbl:scope=micro_batch,coefficient=0.5+lbl:scope=sequence,coefficient=0.5"
    plain, split = Stage().train(), Stage().train()
    plain_balance, balance = attach(plain, strategy), attach(split, strategy)
    balance.loss_scale = 1.0
    forward = split if backend is None else torch.compile(split, backend=backend, fullgraph=True)
    expected = []
    for seed in range(3):
        x = _inputs(seed)
        (plain(x) + plain_balance.loss()).backward()
        expected.append(x.grad)
    inputs = [_inputs(seed) for seed in range(3)]
    losses = [forward(x) for x in inputs[:2]]
    for number in range(3):  # one forward is always ahead: its calls wait for their gradient
        (gradient,) = torch.autograd.grad(losses[number], inputs[number], retain_graph=True)
        assert_close(gradient, expected[number], rtol=1e-5, atol=1e-7)
        if number == 0:
            losses.append(forward(inputs[2]))
    parameters = list(split.parameters())
    for loss in losses:
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    assert_gradients_close(clone_gradients(split), clone_gradients(plain))
    balance.step()
    plain_balance.step()
    assert all(torch.equal(balance.load[name], load) for name, load in plain_balance.load.items())


@pytest.mark.parametrize("has_ticket", [True, False])
def test_a_recomputation_that_is_hardly_alike_is_refused(has_ticket):
    net = block_net()
    balance = attach(net, "lbl:coefficient=0.5")
    net.checkpointing = [None, "reentrant", None]
    balance.loss_scale = None if has_ticket else 1.0
    loss = net(*BATCHES[0])
    loss = loss + balance.loss() if has_ticket else loss
    net.blocks[1].gate.weight.data.neg_()  # what is recomputed chooses other experts
    with pytest.raises(EquipoiseError, match="must choose the experts that it chose before: this one agrees"):
        loss.backward()
