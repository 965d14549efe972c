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
from models import K
from torch.utils.checkpoint import checkpoint
from windows import random_ids

from equipoise import attach

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
