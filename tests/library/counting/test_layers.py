"""Layers that differ: in size, in tokens, called twice, shared, dropped."""

from functools import partial

import models
import pytest
import torch
from block_net import (
    ALL_MASKED,
    BATCHES,
    ORDERS,
    PADDED_LEFT,
    PADDED_RIGHT,
    STRATEGY,
    TOKENS,
    Outcome,
    assert_same_outcome,
    block,
    block_net,
    exact_window,
    run_window,
    save_router,
    save_tap,
    sums,
)
from models import DIM, VOCAB, K
from torch import nn
from torch.utils.checkpoint import checkpoint
from windows import assert_gradients_close, clone_gradients, random_ids

from equipoise import EquipoiseError, attach


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant", "nested_reentrant", save_tap])
def test_layers_of_different_sizes_and_score_functions_beside_a_plain_one(kind, order):
    kinds = ["softmax", ("sigmoid", 4, 1), ("softmax", 9, 3), "sigmoid"]
    net = block_net(kinds)
    expected = exact_window(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.checkpointing = [kind, None, kind, kind, None]
    assert_same_outcome(run_window(net, balance, BATCHES, order), expected)
    assert sums(expected.loads) == [2 * TOKENS, 1 * TOKENS, 3 * TOKENS, 2 * TOKENS]


@pytest.mark.parametrize(
    ("name", "options", "moe"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, (0, 2)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (1,)),
        ("deepseek_v3", {"first_k_dense_replace": 2}, (2,)),
    ],
)
def test_every_second_layer_of_a_family_with_dense_layers_may_be_checkpointed(name, options, moe):
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    outcomes = []
    for layers in ((), (0, 2), (1,)):
        model = models.family(name, layers=3, experts_implementation="eager", **options)
        balance = attach(model, STRATEGY)
        for number in layers:
            layer = model.model.layers[number]
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        (
            model(input_ids=ids, attention_mask=PADDED_RIGHT, labels=ids, use_cache=False).loss + balance.loss()
        ).backward()
        balance.step()
        assert {n: int(load.sum()) for n, load in balance.load.items()} == {
            f"model.layers.{number}.mlp.gate": 2 * 8 for number in moe
        }
        outcomes.append(
            Outcome({n: load.tolist() for n, load in balance.load.items()}, clone_gradients(model), balance.biases)
        )
    for other in outcomes[1:]:
        assert_same_outcome(other, outcomes[0])


MTP_TOKENS = 14 - 2 + 4 + 2 + 12 - 1  # the mask of each row without its first number: (6 + 6), (4 + 2), (5 + 6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant", "nested_non_reentrant", save_router])
def test_a_multi_token_prediction_layer_counts_one_token_less_per_row(kind, order):
    net = block_net(("sigmoid", "softmax", "softmax"), order=[0, 1], mtp_block=2)
    expected = exact_window(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.checkpointing = [None, kind, kind]
    assert_same_outcome(run_window(net, balance, BATCHES, order), expected)
    assert sums(expected.loads) == [K * TOKENS, K * TOKENS, K * MTP_TOKENS]
    assert sum(int(m[:, 1:].sum()) for m in (torch.ones(2, 7), PADDED_RIGHT, PADDED_LEFT)) == MTP_TOKENS
    net.eval()
    net(*BATCHES[0])
    net.train()
    with pytest.raises(EquipoiseError, match="none was"):
        balance.step()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kinds", [[None, None], ["non_reentrant"] * 2, ["reentrant"] * 2, [None, "non_reentrant"]])
@pytest.mark.parametrize("flip", [False, True])
def test_a_router_may_be_called_again_with_fewer_tokens(kinds, flip, order):
    """Its two calls have masks of 14 and 12 numbers, so a recomputation of the wrong call would fail."""
    net = block_net(("sigmoid", "softmax"), order=[0, 1], mtp_block=1)
    expected = exact_window(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.checkpointing = [None, *(kinds[::-1] if flip else kinds)]
    assert_same_outcome(run_window(net, balance, BATCHES, order), expected)
    assert sums(expected.loads) == [K * TOKENS, K * (TOKENS + MTP_TOKENS)]


@pytest.mark.parametrize("kind", ["non_reentrant", save_tap])
def test_a_router_may_be_called_again_with_fewer_tokens_in_a_compiled_graph(kind):
    torch._dynamo.reset()
    net = block_net(("sigmoid", "softmax"), order=[0, 1], mtp_block=1)
    expected = {order: exact_window(net, BATCHES, order) for order in ORDERS}
    balance = attach(net, STRATEGY)
    net.checkpointing = [None, kind, kind]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for order in ORDERS:
        assert_same_outcome(run_window(net, balance, ALL_MASKED, order, compiled), expected[order])


class TwoCalls(nn.Module):
    """Calls its block twice."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(self.block(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("segments", ["each", "together"])
def test_a_shared_router_may_be_recomputed_in_any_order(segments, kind, order):
    """Layers in checkpoints of their own are recomputed from the last to the first, and two in one checkpoint from the
    first."""
    net = block_net(("sigmoid", "softmax"), order=[0, 1, 1])
    expected = exact_window(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    assert list(balance.load) == ["blocks.0.gate", "blocks.1.gate"]
    if segments == "each":
        net.checkpointing = [kind] * 4
    else:
        shared, net.order = TwoCalls(net.blocks[1]), [0]
        net.checkpointing = [None, None]
        head = net.blocks[0].forward
        net.blocks[0].forward = lambda x: checkpoint(shared, head(x), use_reentrant=kind == "reentrant")
    assert_same_outcome(run_window(net, balance, BATCHES, order), expected)
    assert sums(expected.loads) == [K * TOKENS, 2 * K * TOKENS]


class TwoRoutings(nn.Module):
    """Calls its router twice with the same hidden states."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(VOCAB, DIM), block("softmax")

    def forward(self, input_ids):
        x = self.embed(input_ids).reshape(-1, DIM)
        total = 0.0
        for power in (1, 2):
            _, weights, expert_ids = self.block.gate(x)
            total = total + (self.block.experts[expert_ids] * weights[..., None]).sum(-2).pow(power).mean()
        return total


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "loss-free:rate=0.1+lbl:coefficient=0.5"])
def test_two_calls_of_a_router_with_the_same_input_count_twice(backend, strategy):
    """A compiler merges equal computations. It must not merge the two counts."""
    torch._dynamo.reset()
    model = TwoRoutings().train()
    balance = attach(model, strategy)
    forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    (forward(random_ids()) + balance.loss()).backward()
    balance.step()
    assert int(balance.load["block.gate"].sum()) == K * 2 * 14


class PairModel(nn.Module):
    """A wrapper that calls a model twice, the second time without a mask."""

    def __init__(self):
        super().__init__()
        self.inner = models.tiny_lm()

    def forward(self, chosen, mask, rejected):
        return self.inner(chosen, attention_mask=mask) + self.inner(rejected)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_mask_applies_only_to_its_own_call(rows):
    model = PairModel().train()
    balance = attach(model, "loss-free:rate=0.1")
    model(random_ids(), PADDED_RIGHT, random_ids(rows)).backward()
    balance.step()
    assert sums(balance.load) == [K * (8 + 7 * rows)] * 2


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant"])
def test_a_counted_call_without_gradient_is_not_taken_for_one_with_gradient(kind, rows):
    """For example, a frozen model runs in the same forward: counted, never recomputed."""
    net = block_net()
    balance = attach(net, STRATEGY)
    other = block_net()
    other_balance = attach(other, STRATEGY)
    net.checkpointing = [kind] * 3
    for model, b in ((net, balance), (other, other_balance)):
        loss = model(random_ids(), PADDED_RIGHT)
        with torch.no_grad(), b.counting():
            model(random_ids(rows, seed=1))
        (loss + b.loss()).backward()
        b.step()
        assert sums(b.load) == [K * (8 + 7 * rows)] * 2
    assert_gradients_close(clone_gradients(net), clone_gradients(other))


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_that_is_dropped_in_a_micro_batch(order):
    """Stochastic depth. The layer has no tokens and no loss in that micro-batch, which still has all its tokens."""
    net = block_net(("sigmoid", "softmax", "softmax"), dropped_block=1)
    expected = exact_window(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    tokens = []

    def forward(*batch):
        loss = net(*batch)
        tokens.append(int(balance.num_tokens))
        return loss

    assert_same_outcome(run_window(net, balance, BATCHES, order, forward), expected)
    assert sums(expected.loads) == [K * TOKENS, K * (TOKENS - 8), K * TOKENS]
    assert tokens == [14, 8, 12]
