"""Which tokens, once or twice, before or after what? The loops and models that users have, on one process.

Counts are compared with numbers worked by hand, gradients with the float64 loops of ``reference.py`` (``_expected``).
The table of compilers, checkpoints and ranks for a plain model is in ``test_grid.py``.
"""

import io
import itertools
from contextlib import nullcontext
from copy import deepcopy
from functools import cache, partial
from typing import NamedTuple

import models
import pytest
import reference
import torch
from models import DIM, EXPERTS, VOCAB, Block, K
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import equipoise
from equipoise import EquipoiseError, attach

COEFFICIENTS = {"global_batch": 0.5, "sequence": 0.3, "micro_batch": 0.2}
RATE = 0.1
STRATEGY = f"loss-free:rate={RATE}+" + "+".join(f"lbl:scope={s},coefficient={c}" for s, c in COEFFICIENTS.items())
RULES = {"sigmoid": reference.sign_rule, "softmax": reference.proportional_rule}
ORDERS = ("plain", "forwards_first")
FAMILIES = ("deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe")


# ---- a model that is called in many ways ----


def _block(kind, experts=EXPERTS, k=K):
    """A block of the tiny model, with as many experts as one likes."""
    block = Block(kind)
    if (experts, k) != (EXPERTS, K):
        from transformers import Glm4MoeConfig, Qwen3MoeConfig

        if kind == "sigmoid":
            config = Glm4MoeConfig(
                hidden_size=DIM, n_routed_experts=experts, num_experts_per_tok=k, n_group=1, topk_group=1
            )
        else:
            config = Qwen3MoeConfig(hidden_size=DIM, num_experts=experts, num_experts_per_tok=k, norm_topk_prob=True)
        block.gate = type(block.gate)(config)
        nn.init.normal_(block.gate.weight, std=0.7)
        block.experts = nn.Parameter(torch.randn(experts, DIM) * 0.3)
    return block


class Net(nn.Module):
    """Blocks in any order, each called in its own way, and one that runs after them in training only.

    The last predicts a token further: it sees the hidden states of all positions but the last and the embeddings of all
    tokens but the first, so its router gets one token less of every row.
    """

    def __init__(self, blocks, order=None, further=None, drops=None):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(blocks)
        self.order = list(range(len(blocks))) if order is None else order
        self.further = further  # which block
        self.drops = drops  # which block is left out where the first row ends with padding
        self.how = [None] * (len(self.order) + 1)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids)
        checkpoints = self.training and torch.is_grad_enabled()
        for place, index in enumerate(self.order):
            if index == self.drops and not mask[0, -1]:
                continue
            x = _call(self.blocks[index], x, self.how[place] if checkpoints else None)
        loss = _mean(x, mask)
        if self.further is not None and self.training:
            further = x[:, :-1] + self.embed(input_ids[:, 1:])
            how = self.how[-1] if checkpoints else None
            loss = loss + _mean(_call(self.blocks[self.further], further, how), mask[:, 1:])
        return loss


def _mean(x, mask):
    return (x.float().square().mean(-1) * mask).sum() / mask.sum().clamp_min(1)


def _save_matmuls(context, op, *args, **kwargs):
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _save_the_router(context, op, *args, **kwargs):
    aten = torch.ops.aten
    saved = op in (aten.mm.default, aten.sigmoid.default, aten._softmax.default, torch.ops.equipoise.tap.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _save_the_tap(context, op, *args, **kwargs):
    saved = op is torch.ops.equipoise.tap.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE


def _prefer_recompute(context, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


def _must_recompute(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


POLICIES = (_save_matmuls, _save_the_router, _save_the_tap, _prefer_recompute, _must_recompute)


def _call(block, x, how):
    if how is None:
        return block(x)
    if how in ("reentrant", "non_reentrant"):
        return checkpoint(block, x, use_reentrant=how == "reentrant")
    if how in ("nested_reentrant", "nested_non_reentrant"):
        reentrant = how == "nested_reentrant"
        return checkpoint(partial(checkpoint, block, use_reentrant=reentrant), x, use_reentrant=reentrant)
    if how == "mixed":  # a reentrant one inside another kind
        return checkpoint(partial(checkpoint, block, use_reentrant=True), x, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, how)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def _net(kinds=("sigmoid", "softmax"), seed=0, **options):
    torch.manual_seed(seed)
    return Net([_block(*kind) if isinstance(kind, tuple) else _block(kind) for kind in kinds], **options).train()


class Batch(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


def _ids(rows=2, length=7, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])  # 8 tokens of 14, on the right
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # 12 of 14
BATCHES = [Batch(_ids(seed=1)), Batch(_ids(seed=2), PADDED), Batch(_ids(seed=3), LEFT)]
MASKED = [Batch(ids, torch.ones_like(ids) if mask is None else mask) for ids, mask in BATCHES]  # for a single graph
TOKENS = 14 + 8 + 12


class Outcome(NamedTuple):
    loads: dict
    gradients: dict
    biases: dict


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _gates(net):
    return {
        f"blocks.{i}.gate": (block.gate, "sigmoid" if hasattr(block.gate, "e_score_correction_bias") else "softmax")
        for i, block in enumerate(net.blocks)
    }


def _expected(net, batches, order="plain"):
    """What a window of ``batches``, each of equal weight, must give from biases of zero. ``net`` is not attached.

    Two passes: the choices of all micro-batches, then the gradients of the losses by the float64 loops, which a plain
    copy of the model carries from the logits to the parameters.
    """
    net = deepcopy(net)
    net.how = [None] * len(net.how)
    routers, seen = _gates(net), []
    for name, (router, _) in routers.items():
        router.register_forward_hook(lambda m, a, output, name=name: seen.append((name, output[0], output[2])))
    passes = []
    for batch in batches:
        seen.clear()
        loss = net(*batch)
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        calls = {name: [] for name in routers}
        for name, logits, ids in seen:
            here = mask if ids.shape[0] == mask.numel() else mask[:, 1:]
            calls[name].append((logits, ids.tolist(), here.reshape(-1).tolist(), ids.shape[0] // mask.shape[0]))
        passes.append((loss, calls))
    counts = {
        name: [
            reference.load(
                [row for _, ids, _, _ in calls[name] for row in ids],
                router.weight.shape[0],
                [m for _, _, mask, _ in calls[name] for m in mask],
            )
            for _, calls in passes
        ]
        for name, (router, _) in routers.items()
    }
    roots, factors = [], []
    for number, (loss, calls) in enumerate(passes):
        roots.append(loss)
        factors.append(torch.tensor(1.0 / len(batches)))
        for name, (_, score_function) in routers.items():
            if not calls[name]:
                continue
            rows = [row for logits, *_ in calls[name] for row in logits.detach().double().tolist()]
            ids = [row for _, ids, _, _ in calls[name] for row in ids]
            mask = [m for _, _, mask, _ in calls[name] for m in mask]
            sequences = [
                (call, t // length) for call, (_, i, _, length) in enumerate(calls[name]) for t in range(len(i))
            ]
            known = counts[name] if order == "forwards_first" else counts[name][: number + 1]
            pooled = [sum(column) for column in zip(*known, strict=True)]
            parts = {
                "global_batch": reference.load_balancing_gradient(rows, pooled, score_function, mask),
                "micro_batch": reference.load_balancing_gradient(rows, counts[name][number], score_function, mask),
                "sequence": reference.sequence_gradient(rows, ids, sequences, score_function, mask),
            }
            total = sum(c * torch.tensor(parts[scope], dtype=torch.float64) for scope, c in COEFFICIENTS.items())
            for logits, part in zip(
                [c[0] for c in calls[name]], total.split([len(c[1]) for c in calls[name]]), strict=True
            ):
                if logits.requires_grad:
                    roots.append(logits)
                    factors.append((part / len(batches)).to(logits.dtype))
    torch.autograd.backward(roots, factors)
    loads = {name: [sum(column) for column in zip(*counts[name], strict=True)] for name in routers}
    biases = {
        name: torch.tensor(RULES[score_function]([0.0] * len(loads[name]), loads[name], RATE, True))
        for name, (_, score_function) in routers.items()
    }
    return Outcome(loads, _gradients(net), biases)


def _window(net, balance, batches, order="plain", forward=None, before=lambda number: None):
    """One window of ``batches``, each of equal weight, from biases of zero."""
    forward = net if forward is None else forward
    net.zero_grad()
    zeros = {name: torch.zeros_like(bias) for name, bias in balance.biases.items()}
    balance.load_state_dict({"num_windows": 0, "biases": zeros})
    losses = []
    for number, batch in enumerate(batches):
        before(number)
        loss = (forward(*batch) + balance.loss()) / len(batches)
        if order == "plain":
            loss.backward()
        else:
            losses.append(loss)
    if losses:
        torch.stack(losses).sum().backward()
    balance.step()
    loads = {name: load.tolist() for name, load in balance.load.items()}
    return Outcome(loads, _gradients(net), balance.biases)


def _close(found, expected, rtol=2e-6):
    """By norm over all parameters: float32 rounds to 6e-8, a few dozen roundings."""
    assert found.keys() == expected.keys()
    distance = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in found) ** 0.5
    size = sum(float(expected[k].double().square().sum()) for k in expected) ** 0.5
    assert size > 0 and distance <= rtol * size, distance / size


def _same(found, expected):
    assert found.loads == expected.loads, "a token was counted twice, or not at all"
    _close(found.gradients, expected.gradients)
    for name, bias in expected.biases.items():
        assert_close(found.biases[name], bias, rtol=0, atol=1e-6)  # float32 sums of a few terms


@cache
def _plain(order):
    return _expected(_net(), BATCHES, order)


def _sums(loads):
    return [int(sum(load)) for load in loads.values()]


def _counter(net):
    """How often routers were run, recomputations too."""
    runs = []
    for router, _ in _gates(net).values():
        router.register_forward_hook(lambda *_: runs.append(1))
    return runs


# ---- recomputation of every kind ----

HOW = {
    "saves the matrix products": [_save_matmuls] * 3,
    "saves the router": [_save_the_router] * 3,
    "saves the tap": [_save_the_tap] * 3,
    "prefers to recompute": [_prefer_recompute] * 3,
    "must recompute": [_must_recompute] * 3,
    "the first layer": ["non_reentrant", None, None],
    "the second layer": [None, "non_reentrant", None],
    "the second layer, reentrant": [None, "reentrant", None],
    "a policy beside a checkpoint": [_save_the_router, "non_reentrant", None],
    "nested": ["nested_non_reentrant"] * 3,
    "nested, reentrant": ["nested_reentrant"] * 3,
    "nested, mixed": ["mixed"] * 3,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", HOW)
def test_recomputation_of_any_part_is_not_counted_and_finds_its_micro_batch(how, order):
    net = _net()
    balance = attach(net, STRATEGY)
    net.how = HOW[how]
    runs = _counter(net)
    _same(_window(net, balance, BATCHES, order), _plain(order))
    assert _sums(_plain(order).loads) == [K * TOKENS] * 2
    assert len(runs) > 2 * len(BATCHES), "nothing was recomputed: the test proves nothing"


COMPILED = [
    "saves the matrix products",
    "saves the router",
    "the second layer, reentrant",
    "nested",
]


@pytest.mark.parametrize("how", COMPILED)
def test_recomputation_inside_a_graph_is_not_counted(how):
    torch._dynamo.reset()
    net = _net()
    balance = attach(net, STRATEGY)
    net.how = HOW[how]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for order in ORDERS:
        _same(_window(net, balance, MASKED, order, compiled), _plain(order))


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_what_the_compiler_recomputes_by_itself_is_not_counted(budget):
    torch._dynamo.reset()
    net = _net()
    balance = attach(net, STRATEGY)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = torch.compile(net, backend="aot_eager_decomp_partition", fullgraph=True)
        for order in ORDERS:
            _same(_window(net, balance, MASKED, order, compiled), _plain(order))


@pytest.mark.parametrize("order", ORDERS)
def test_activations_that_are_kept_elsewhere_bring_their_micro_batch_back(order):
    net = _net()
    balance = attach(net, STRATEGY)
    net.how = [None, "non_reentrant", None]
    with torch.autograd.graph.save_on_cpu():
        found = _window(net, balance, BATCHES, order)
    _same(found, _plain(order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_model_may_be_one_checkpoint(reentrant, order):
    """The model's own hooks run again in the backward; they must not touch the next micro-batch's mask."""
    net = _net()
    balance = attach(net, STRATEGY)
    tie = torch.zeros(1, requires_grad=True)  # a reentrant checkpoint needs an input with a gradient

    def forward(ids, mask):
        return checkpoint(lambda t, *args: net(*args) + 0 * t.sum(), tie, ids, mask, use_reentrant=reentrant)

    _same(_window(net, balance, BATCHES, order, forward), _plain(order))
    net.zero_grad()
    loss = (forward(_ids(seed=1), None) + balance.loss()) / 3
    balance.token_mask(PADDED)  # of the next one, before the backward of this one
    loss.backward()
    net(_ids(seed=2))
    assert balance.num_tokens == 8
    balance.loss()
    balance.step()
    assert _sums(balance.load) == [K * (14 + 8)] * 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", _save_the_router])
def test_checkpointing_may_be_switched_between_micro_batches(kind, order):
    for pattern in itertools.product((False, True), repeat=3):
        net = _net()
        balance = attach(net, STRATEGY)

        def switch(number, net=net, pattern=pattern):
            net.how = [kind if pattern[number] else None] * 3

        _same(_window(net, balance, BATCHES, order, before=switch), _plain(order))


UNEVEN = [Batch(_ids(3, 5, 4)), Batch(_ids(1, 4, 5)), Batch(_ids(2, 7, 6), PADDED), Batch(_ids(4, 3, 7))]


@cache
def _uneven(order):
    return _expected(_net(), UNEVEN, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("pattern", ["1010", "0101", "1100", "0001"])
def test_uneven_micro_batches_of_which_some_are_checkpointed(pattern, kind, order):
    net = _net()
    balance = attach(net, STRATEGY)

    def switch(number):
        net.how = [kind if pattern[number] == "1" else None] * 3

    _same(_window(net, balance, UNEVEN, order, before=switch), _uneven(order))
    assert _sums(_uneven(order).loads) == [K * (15 + 4 + 8 + 12)] * 2


def test_uneven_micro_batches_in_one_graph_of_any_size():
    torch._dynamo.reset()
    net = _net()
    balance = attach(net, STRATEGY)
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    for order in ORDERS:
        _same(_window(net, balance, UNEVEN, order, compiled), _uneven(order))


# ---- packed sequences ----


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sequences_of_a_family_equal_unpacked_ones(name, checkpointing):
    """Rows of 5, 3 and 4 tokens, and the same in one row of 13 with a token of padding behind."""
    strategy = "loss-free:rate=0.1+lbl:scope=sequence,coefficient=0.5+lbl:scope=micro_batch,coefficient=0.2"
    lengths = [5, 3, 4]
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    found = []
    for packed in (False, True):
        model = models.family(name, experts_implementation="eager")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        balance = attach(model, strategy)
        if packed:
            rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
            row = torch.cat([*rows, torch.zeros(1, dtype=torch.long)])[None]
            labels = torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in rows] + [torch.tensor([-100])])
            positions = torch.tensor([[*range(5), *range(3), *range(4), 0]])
            sequence_ids = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4 + [3]])
            balance.token_mask((sequence_ids < 3).long(), sequence_ids)
            loss = model(input_ids=row, position_ids=positions, labels=labels[None], use_cache=False).loss
        else:
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        assert balance.num_tokens == 12
        ticket = balance.loss()
        (loss + ticket).backward()
        balance.step()
        assert [int(load.sum()) for load in balance.load.values()] == [2 * 12] * 2
        loads = {n: load.tolist() for n, load in balance.load.items()}
        found.append((Outcome(loads, _gradients(model), balance.biases), float(loss.detach()), float(ticket.detach())))
    (unpacked, loss, ticket), (packed, packed_loss, packed_ticket) = found
    assert packed.loads == unpacked.loads
    assert packed_loss == pytest.approx(loss, rel=1e-6) and packed_ticket == pytest.approx(ticket, rel=1e-6)
    # the tables of both have a row for padding, of which only the unpacked has a gradient: zero, by the mask
    _close(packed.gradients, unpacked.gradients, 1e-5)
    for n in packed.biases:
        assert torch.equal(packed.biases[n], unpacked.biases[n])


# ---- layers that are not all alike ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", [None, "reentrant", "non_reentrant", "nested_reentrant", _save_the_tap])
def test_layers_of_many_sizes_and_gates_beside_dense_ones(how, order):
    kinds = ["softmax", ("sigmoid", 4, 1), ("softmax", 9, 3), "sigmoid"]
    net = _net(kinds)
    expected = _expected(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.how = [how, None, how, how, None]
    _same(_window(net, balance, BATCHES, order), expected)
    assert _sums(expected.loads) == [2 * TOKENS, 1 * TOKENS, 3 * TOKENS, 2 * TOKENS]


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
    found = []
    for layers in ((), (0, 2), (1,)):
        model = models.family(name, layers=3, experts_implementation="eager", **options)
        balance = attach(model, STRATEGY)
        for number in layers:
            layer = model.model.layers[number]
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        (model(input_ids=ids, attention_mask=PADDED, labels=ids, use_cache=False).loss + balance.loss()).backward()
        balance.step()
        assert {n: int(load.sum()) for n, load in balance.load.items()} == {
            f"model.layers.{number}.mlp.gate": 2 * 8 for number in moe
        }
        found.append(Outcome({n: load.tolist() for n, load in balance.load.items()}, _gradients(model), balance.biases))
    for other in found[1:]:
        _same(other, found[0])


FURTHER = 14 - 2 + 4 + 2 + 12 - 1  # of each row the mask without its first number: (6 + 6), (4 + 2), (5 + 6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", [None, "reentrant", "non_reentrant", "nested_non_reentrant", _save_the_router])
def test_a_layer_that_predicts_a_token_further_counts_one_token_less_of_every_row(how, order):
    net = _net(("sigmoid", "softmax", "softmax"), order=[0, 1], further=2)
    expected = _expected(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.how = [None, how, how]
    _same(_window(net, balance, BATCHES, order), expected)
    assert _sums(expected.loads) == [K * TOKENS, K * TOKENS, K * FURTHER]
    assert sum(int(m[:, 1:].sum()) for m in (torch.ones(2, 7), PADDED, LEFT)) == FURTHER
    net.eval()
    net(*BATCHES[0])
    net.train()
    with pytest.raises(EquipoiseError, match="none was"):
        balance.step()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hows", [[None, None], ["non_reentrant"] * 2, ["reentrant"] * 2, [None, "non_reentrant"]])
@pytest.mark.parametrize("flip", [False, True])
def test_a_router_that_is_called_again_on_fewer_tokens(hows, flip, order):
    """Its two calls have masks of 14 and 12 numbers: a recomputation that takes the other's place fails."""
    net = _net(("sigmoid", "softmax"), order=[0, 1], further=1)
    expected = _expected(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.how = [None, *(hows[::-1] if flip else hows)]
    _same(_window(net, balance, BATCHES, order), expected)
    assert _sums(expected.loads) == [K * TOKENS, K * (TOKENS + FURTHER)]


@pytest.mark.parametrize("how", ["non_reentrant", _save_the_tap])
def test_a_router_that_is_called_again_on_fewer_tokens_inside_a_graph(how):
    torch._dynamo.reset()
    net = _net(("sigmoid", "softmax"), order=[0, 1], further=1)
    expected = {order: _expected(net, BATCHES, order) for order in ORDERS}
    balance = attach(net, STRATEGY)
    net.how = [None, how, how]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for order in ORDERS:
        _same(_window(net, balance, MASKED, order, compiled), expected[order])


class _Segment(nn.Module):
    """Two layers, as one."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(self.block(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("segments", ["each", "together"])
def test_a_router_shared_by_layers_is_served_whatever_the_order_of_recomputation(segments, kind, order):
    """Each layer by itself is recomputed from the last to the first, a segment of two from its first."""
    net = _net(("sigmoid", "softmax"), order=[0, 1, 1])
    expected = _expected(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    assert list(balance.load) == ["blocks.0.gate", "blocks.1.gate"]
    if segments == "each":
        net.how = [kind] * 4
    else:
        shared, net.order = _Segment(net.blocks[1]), [0]
        net.how = [None, None]
        head = net.blocks[0].forward
        net.blocks[0].forward = lambda x: checkpoint(shared, head(x), use_reentrant=kind == "reentrant")
    _same(_window(net, balance, BATCHES, order), expected)
    assert _sums(expected.loads) == [K * TOKENS, 2 * K * TOKENS]


class _Twice(nn.Module):
    """Asks its router twice about the same hidden states."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(VOCAB, DIM), _block("softmax")

    def forward(self, input_ids):
        x = self.embed(input_ids).reshape(-1, DIM)
        total = 0.0
        for power in (1, 2):
            _, weights, expert_ids = self.block.gate(x)
            total = total + (self.block.experts[expert_ids] * weights[..., None]).sum(-2).pow(power).mean()
        return total


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("strategy", ["loss-free:rate=0.1", "loss-free:rate=0.1+lbl:coefficient=0.5"])
def test_two_calls_of_a_router_with_the_same_input_are_two(backend, strategy):
    """A compiler merges what it computes twice; a count is no computation."""
    torch._dynamo.reset()
    model = _Twice().train()
    balance = attach(model, strategy)
    forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    (forward(_ids()) + balance.loss()).backward()
    balance.step()
    assert int(balance.load["block.gate"].sum()) == K * 2 * 14


class _Pair(nn.Module):
    """A wrapper of one's own that calls a model twice, the second time without a mask."""

    def __init__(self):
        super().__init__()
        self.inner = models.tiny_lm()

    def forward(self, chosen, mask, rejected):
        return self.inner(chosen, attention_mask=mask) + self.inner(rejected)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_mask_holds_for_the_call_that_it_was_given_to(rows):
    model = _Pair().train()
    balance = attach(model, "loss-free:rate=0.1")
    model(_ids(), PADDED, _ids(rows)).backward()
    balance.step()
    assert _sums(balance.load) == [K * (8 + 7 * rows)] * 2


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant"])
def test_a_counted_call_without_a_gradient_takes_no_place_of_one_with(kind, rows):
    """A teacher's pass with the same model after the student's: counted, never recomputed."""
    net = _net()
    balance = attach(net, STRATEGY)
    other = _net()
    other_balance = attach(other, STRATEGY)
    net.how = [kind] * 3
    for model, b in ((net, balance), (other, other_balance)):
        loss = model(_ids(), PADDED)
        with torch.no_grad():
            model(_ids(rows, seed=1))
        (loss + b.loss()).backward()
        b.step()
        assert _sums(b.load) == [K * (8 + 7 * rows)] * 2
    _close(_gradients(net), _gradients(other))


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_that_is_dropped_in_a_micro_batch(order):
    """Stochastic depth. The layer has no tokens and no loss there; the micro-batch has its tokens all the same."""
    net = _net(("sigmoid", "softmax", "softmax"), drops=1)
    expected = _expected(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    tokens = []

    def forward(*batch):
        loss = net(*batch)
        tokens.append(int(balance.num_tokens))
        return loss

    _same(_window(net, balance, BATCHES, order, forward), expected)
    assert _sums(expected.loads) == [K * TOKENS, K * (TOKENS - 8), K * TOKENS]
    assert tokens == [14, 8, 12]


# ---- frozen parts ----

FROZEN = {
    "routers": lambda name: ".gate." in name,
    "the first router": lambda name: name.startswith("blocks.0.gate"),
    "all but experts": lambda name: not name.endswith(".experts"),
    "all but routers": lambda name: ".gate." not in name,
    "all but the last layer's output": lambda name: not name.startswith("blocks.1.out"),  # no path to any router
    "the embedding and the routers": lambda name: ".gate." in name or name.startswith("embed"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", [None, "non_reentrant", _save_the_tap])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts_have_no_gradient_and_everything_is_counted(frozen, how, order):
    net = _net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    expected = _expected(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.how = [how] * 3
    _same(_window(net, balance, BATCHES, order), expected)
    assert _sums(expected.loads) == [K * TOKENS] * 2
    assert all(bias.any() for bias in expected.biases.values())
    assert {name for name, p in net.named_parameters() if p.grad is None} == {
        name for name, _ in net.named_parameters() if FROZEN[frozen](name)
    }


@pytest.mark.parametrize("frozen", ["routers", "all but the last layer's output"])
def test_frozen_parts_inside_a_graph(frozen):
    torch._dynamo.reset()
    net = _net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    expected = _expected(net, BATCHES)
    balance = attach(net, STRATEGY)
    _same(_window(net, balance, MASKED, forward=torch.compile(net, backend="aot_eager", fullgraph=True)), expected)


def test_routers_may_be_frozen_between_micro_batches():
    """A warm-up that ends: the micro-batch before has its gradient, the one after has none."""
    net = _net()
    alone = _expected(net, BATCHES[:1])
    balance = attach(net, STRATEGY)
    (net(*BATCHES[0]) + balance.loss()).backward()
    for router, _ in _gates(net).values():
        router.requires_grad_(False)
    held = {name: router.weight.grad.clone() for name, (router, _) in _gates(net).items()}
    _close({f"{n}.weight": g for n, g in held.items()}, {f"{n}.weight": alone.gradients[f"{n}.weight"] for n in held})
    (net(*BATCHES[1]) + balance.loss()).backward()
    for name, (router, _) in _gates(net).items():
        assert torch.equal(router.weight.grad, held[name])
    balance.step()
    assert _sums(balance.load) == [K * (14 + 8)] * 2


# ---- evaluation and generation in between ----


def _evaluate(net, balance):
    net.eval()
    with torch.no_grad():
        net(_ids(3, 4, 20))
    net.train()


def _evaluate_inference(net, balance):
    net.eval()
    with torch.inference_mode():
        net(_ids(3, 4, 20), torch.tensor([[0, 1, 1, 1]] * 3))
    net.train()


def _evaluate_backward(net, balance):
    """A probe of gradients in evaluation mode: plain ones, and the grads of the window are put back."""
    held = {name: p.grad for name, p in net.named_parameters()}
    how, net.how = net.how, [None] * 3
    net.zero_grad(set_to_none=True)
    net.eval()
    net(_ids(3, 4, 20)).backward()
    net.train()
    net.how = how
    for name, p in net.named_parameters():
        p.grad = held[name]


def _measure(net, balance):
    net.eval()
    with torch.inference_mode(), balance.measuring() as load:
        net(_ids(3, 4, 20))
    net.train()
    assert [int(x.sum()) for x in load.values()] == [K * 12] * 2


def _measure_in_training_mode(net, balance):
    with torch.no_grad(), balance.measuring() as load:
        net(_ids(3, 4, 20))
        net(_ids(1, 4, 21), torch.tensor([[0, 1, 1, 0]]))
    assert [int(x.sum()) for x in load.values()] == [K * 14] * 2


def _pause(net, balance):
    with balance.paused():
        net(_ids(3, 4, 20))


def _fail(net, balance):
    """An evaluation that runs out of memory."""
    net.eval()
    handle = net.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        net(_ids(3, 4, 20))
    handle.remove()
    net.train()


def _copy(net, balance):
    copy = deepcopy(net)
    copy(_ids(3, 4, 20))
    copy.eval()
    copy(_ids(3, 4, 20))


BETWEEN = [
    _evaluate,
    _evaluate_inference,
    _evaluate_backward,
    _measure,
    _measure_in_training_mode,
    _pause,
    _fail,
]


def _interrupted_window(net, balance, between, given):
    """Two windows of two micro-batches with ``between`` at every place where a user may have put it."""
    losses = []
    for _ in range(2):
        for number, (ids, mask) in enumerate(BATCHES[1:]):
            between(net, balance)
            if given:
                balance.token_mask(mask)
                between(net, balance)
                loss = net(ids)
            else:
                loss = net(ids, mask)
            between(net, balance)
            tokens = int(balance.num_tokens)
            assert tokens == (8, 12)[number]
            ticket = balance.loss()
            between(net, balance)
            losses.append((loss + ticket).detach())
            ((loss + ticket) / 2).backward()
            between(net, balance)
            assert balance.num_tokens == tokens
        gradients = _gradients(net)
        balance.step()
        between(net, balance)
    return losses, gradients, balance.load, balance.biases, balance.metrics(), balance.state_dict()


@pytest.mark.parametrize(
    ("kind", "given"), [(None, False), (None, True), ("non_reentrant", False), ("reentrant", True)]
)
@pytest.mark.parametrize("strategy", [STRATEGY, "quantile+z:coefficient=0.1"], ids=["losses", "quantile"])
@pytest.mark.parametrize("between", [*BETWEEN, _copy], ids=lambda f: f.__name__.strip("_"))
def test_nothing_in_between_changes_a_window_by_a_bit(between, strategy, kind, given):
    found = []
    for function in (lambda *_: None, between):
        net = _net()
        net.how = [kind] * 3
        balance = attach(net, strategy)
        found.append(_interrupted_window(net, balance, function, given))
    (losses, gradients, load, biases, metrics, state), theirs = found
    assert all(torch.equal(a, b) for a, b in zip(losses, theirs[0], strict=True))
    for ours, other in ((gradients, theirs[1]), (load, theirs[2]), (biases, theirs[3])):
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert metrics == theirs[4]
    assert state["num_windows"] == theirs[5]["num_windows"] == 2
    assert _sums(load) == [K * (8 + 12)] * 2


@pytest.mark.parametrize("where", ["measuring", "paused"])
def test_a_token_mask_that_is_given_in_between_ends_there(where):
    net = _net()
    balance = attach(net, "loss-free:rate=0.1")
    with torch.no_grad(), balance.measuring() if where == "measuring" else balance.paused() as load:
        balance.token_mask(PADDED)
        net(_ids())
    if where == "measuring":
        assert _sums(load) == [K * 8] * 2
    net(_ids(), LEFT)
    balance.step()
    assert _sums(balance.load) == [K * 12] * 2


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_generation_counts_where_it_should_and_nowhere_else(name):
    """Prompts of 3 and 5 tokens in rows of 5, and 4 tokens more each: the last one is never read."""
    prompt = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    read = 3 + 5 + 2 * (4 - 1)
    batch = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    found = []
    for generates in (False, True):
        model = models.family(name)
        balance = attach(model, STRATEGY)

        def generate(model=model, generates=generates):
            if generates:
                text = model.generate(
                    prompt, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True
                )
                assert text.shape == (2, 9)

        for number in range(2):
            with balance.paused():
                generate()
            loss = model(input_ids=batch, attention_mask=PADDED, labels=batch).loss
            with balance.paused():
                generate()
            model.eval()
            generate()
            model.train(number == 0)
            with balance.measuring() as load:
                generate()
            assert [int(x.sum()) for x in load.values()] == [2 * read * generates] * 2
            model.train()
            (loss + balance.loss()).backward()
        balance.step()
        assert [int(x.sum()) for x in balance.load.values()] == [2 * 2 * 8] * 2
        found.append((_gradients(model), balance.load, balance.biases, balance.metrics()))
    for ours, theirs in zip(found[0][:3], found[1][:3], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert found[0][3] == found[1][3]
    generate()  # in training mode, not paused: it counts as any other forward does
    balance.step()
    assert [int(x.sum()) for x in balance.load.values()] == [2 * read] * 2


@pytest.mark.parametrize("strategy", ["quantile", "quantile:bins=0", "loss-free:rule=sign,scope=micro_batch"])
def test_a_training_forward_under_inference_mode_is_counted_by_every_mechanism(strategy):
    found = []
    for surrounding in (torch.inference_mode, nullcontext):
        net = _net()
        balance = attach(net, strategy)
        with surrounding():
            net(_ids())
        net(_ids(seed=1)).backward()
        balance.step()
        with surrounding():
            net(_ids(seed=2))
            balance.step()
        net(_ids(seed=3))
        balance.step()
        assert _sums(balance.load) == [K * 14] * 2
        found.append(balance.biases)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---- casts, moves, copies ----


def _slots(net):
    return [
        router._buffers.get("_equipoise_bias", router._buffers.get("e_score_correction_bias"))
        for router, _ in _gates(net).values()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_between_windows_goes_on_in_float32(dtype):
    net = _net()
    balance = attach(net, STRATEGY)
    biases = {name: [0.0] * EXPERTS for name in balance.biases}
    for number, cast in enumerate((None, dtype, None, torch.float32, None)):
        if cast is not None:
            net.to(cast)
            assert all(torch.equal(slot, o) for slot, o in zip(_slots(net), balance.biases.values(), strict=True))
        net.zero_grad()
        for batch in BATCHES[: 1 + number % 3]:
            ((net(*batch) + balance.loss()) / 3).backward()
        balance.step()
        assert _sums(balance.load) == [K * (14, 22, 34)[number % 3]] * 2
        for name, (router, kind) in _gates(net).items():
            assert router.weight.grad.any() and router.weight.grad.dtype == router.weight.dtype
            biases[name] = RULES[kind](biases[name], balance.load[name].tolist(), RATE, True)
            assert balance.biases[name].dtype == torch.float32
            assert_close(balance.biases[name], torch.tensor(biases[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("when", ["between windows", "between micro-batches"])
def test_a_model_that_is_emptied_and_loaded_goes_on_as_if_it_had_not_been(when):
    """Weights that are moved away and back, for a rollout say: to_empty, then the state of before."""
    found = []
    for moved in (False, True):
        net = _net()
        balance = attach(net, f"{STRATEGY}+lbl:pooling=previous,coefficient=0.1")
        for number, batch in enumerate((*BATCHES, *BATCHES)):
            if moved and number == (3 if when == "between windows" else 4):
                state = {name: value.clone() for name, value in net.state_dict().items()}
                grads = {name: p.grad for name, p in net.named_parameters()}
                net.to(device="meta")
                net.to_empty(device="cpu")
                for parameter in net.parameters():
                    nn.init.constant_(parameter, float("nan"))
                net.load_state_dict(state)
                for name, parameter in net.named_parameters():
                    parameter.grad = grads[name]
            ((net(*batch) + balance.loss()) / 3).backward()
            if number == 2:
                balance.step()
        balance.step()
        assert _sums(balance.load) == [K * TOKENS] * 2
        found.append((_gradients(net), balance.load, balance.biases))
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_the_weights_evaluates_and_trains_without_being_counted(use_buffers):
    net = _net()
    balance = attach(net, STRATEGY)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=use_buffers)
    means = [torch.zeros(EXPERTS)] * 2
    for window in range(3):
        net.zero_grad()
        for batch in BATCHES:
            loss = (net(*batch) + balance.loss()) / 3
            average.eval()
            with torch.no_grad():
                average(*batch)
            average.train()
            average(*batch).backward()  # no ticket needed: it has no losses
            loss.backward()
        balance.step()
        assert _sums(balance.load) == [K * TOKENS] * 2
        average.update_parameters(net)
        biases = list(balance.biases.values())
        # the first update copies; later ones average: 0.75 of before, 0.25 of now
        means = [o if window == 0 else 0.75 * m + 0.25 * o for m, o in zip(means, biases, strict=True)]
        for slot, mean, bias in zip(_slots(average.module), means, biases, strict=True):
            assert_close(slot, mean if use_buffers else bias, rtol=0, atol=1e-7)
        for slot, bias in zip(_slots(net), biases, strict=True):
            assert torch.equal(slot, bias) and bias.any()


def test_a_detached_model_is_attached_again_in_the_middle_of_a_window():
    net = _net()
    expected = _expected(net, BATCHES[1:])
    balance = attach(net, STRATEGY)
    (net(*BATCHES[2]) + balance.loss()).backward()
    balance.step()
    before = balance.biases
    net.zero_grad()
    pending = net(*BATCHES[0]) + balance.loss()
    again = attach(net, STRATEGY, biases=balance.detach())
    for name, bias in before.items():
        assert torch.equal(again.biases[name], bias) and bias.any()
    plain = deepcopy(net)
    plain(*BATCHES[0]).backward()
    pending.backward()  # the first balance is gone: no gradient of its losses, no count of its tokens
    _close(_gradients(net), _gradients(plain), 0)
    with pytest.raises(EquipoiseError, match="was detached"):
        balance.step()
    _same(_window(net, again, BATCHES[1:]), expected)
    assert _sums(again.load) == [K * (8 + 12)] * 2


def _round_trip(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [deepcopy, _round_trip], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_compiled_model_is_not_counted_and_can_be_attached(copy_of):
    torch._dynamo.reset()
    net = _net()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    balance = attach(compiled, STRATEGY)
    first = _window(net, balance, MASKED, forward=compiled)
    _same(first, _plain("plain"))
    (compiled(*MASKED[0]) + balance.loss()).backward()
    copy = copy_of(compiled)
    copy(*BATCHES[1]).backward()
    copy.eval()
    copy(*BATCHES[1])
    copy.train()
    own = attach(copy, STRATEGY)
    assert list(own.load) == list(balance.load)
    copy.zero_grad()
    (copy(*BATCHES[2]) + own.loss()).backward()
    own.step()
    balance.step()
    assert _sums(own.load) == [K * 12] * 2 and _sums(balance.load) == [K * 14] * 2
    _same(_window(net, balance, MASKED, forward=compiled), first)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp_of_compile": lambda m: nn.parallel.DistributedDataParallel(torch.compile(m, backend="eager")),
    "sequential": nn.Sequential,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("first", ["model", "wrapper"])
def test_a_wrapped_model_is_not_attached_twice(one_rank, wrapper, first):
    net = _net()
    wrapped = WRAPPERS[wrapper](net)
    one, other = (net, wrapped) if first == "model" else (wrapped, net)
    balance = attach(one, STRATEGY)
    with pytest.raises(EquipoiseError, match=r"blocks\.0\.gate is attached already"):
        attach(other, "loss-free")
    (net(*BATCHES[0]) + balance.loss()).backward()
    balance.step()
    assert _sums(balance.load) == [K * 14] * 2


def test_a_model_and_its_part_are_not_attached_both():
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    for first in ("part", "whole"):
        model = models.family("qwen3_moe", experts_implementation="eager")
        one, other = (model.model, model) if first == "part" else (model, model.model)
        balance = attach(one, STRATEGY)
        hooks = len(model._forward_hooks) + len(model.model._forward_hooks)
        for wrong in (other, model.model.layers[1], nn.ModuleList([model])):
            with pytest.raises(EquipoiseError, match="is attached already"):
                attach(wrong, "loss-free")
        assert len(model._forward_hooks) + len(model.model._forward_hooks) == hooks, "the refused one left hooks"
        # the whole hands its mask on to its part
        (model(input_ids=ids, attention_mask=PADDED, labels=ids).loss + balance.loss()).backward()
        balance.step()
        assert [int(load.sum()) for load in balance.load.values()] == [2 * 8] * 2


def test_an_average_may_be_attached_by_itself():
    net = _net()
    balance = attach(net, STRATEGY)
    average = AveragedModel(net)
    own = attach(average, "loss-free:rate=0.1")
    average(*BATCHES[1])
    net(*BATCHES[0])
    own.step()
    balance.loss()
    balance.step()
    assert _sums(own.load) == [K * 8] * 2 and _sums(balance.load) == [K * 14] * 2
    with pytest.raises(EquipoiseError, match="is attached already"):
        attach(average)


# ---- no graph is made twice ----


@pytest.fixture
def no_recompilation():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: setattr(torch._dynamo.config, "error_on_recompile", True)
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def _graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_compiled_once(name, no_recompilation):
    """Three windows: masks and biases change, weights train, state and metrics are asked for."""
    model = models.family(name, layers=1)
    balance = attach(model, "loss-free:rate=0.1+lbl:coefficient=0.5")
    forward = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = None
    for window in range(3):
        for number in range(2):
            ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(2 * window + number))
            mask = torch.ones(2, 8, dtype=torch.long)
            mask[0, 8 - window - number :] = 0
            (forward(input_ids=ids, attention_mask=mask, labels=ids).loss + balance.loss()).backward()
            no_recompilation()
        optimizer.step()
        optimizer.zero_grad(set_to_none=window == 1)
        balance.step()
        assert [int(load.sum()) for load in balance.load.values()] == [2 * (32 - 2 * window - 1)]
        (bias,) = balance.biases.values()
        assert before is None or not torch.equal(bias, before)
        before = bias
        balance.load_state_dict(balance.state_dict())
        model.load_state_dict(model.state_dict())
        assert balance.metrics()["tokens"] == 32 - 2 * window - 1
    assert _graphs() == 1


def test_a_compiled_model_is_evaluated_and_measured_without_a_new_graph(no_recompilation):
    net = _net()
    balance = attach(net, STRATEGY)
    forward = torch.compile(net, backend="aot_eager", fullgraph=True)
    graphs = None
    for _ in range(3):
        for batch in BATCHES[1:]:
            (forward(*batch) + balance.loss()).backward()
        with torch.no_grad():
            with balance.paused():
                forward(*BATCHES[1])
            with balance.measuring():
                forward(*BATCHES[2])
        net.eval()
        with torch.no_grad():
            with balance.measuring() as load:
                forward(*BATCHES[2])
            forward(*BATCHES[2])
        net.train()
        assert _sums(load) == [K * 12] * 2
        balance.step()
        assert _sums(balance.load) == [K * (8 + 12)] * 2
        no_recompilation()
        assert graphs in (None, _graphs())
        graphs = _graphs()
    assert graphs == 3, "in training with a gradient and without one, and in evaluation"


def _deep(layers=10):
    torch.manual_seed(0)
    return Net([_block("softmax") for _ in range(layers)]).train()


def test_layers_that_are_compiled_one_by_one_share_a_graph(no_recompilation):
    """As without balancing. Dynamo gives up after eight graphs of one function."""
    net = _deep()
    expected = _expected(net, BATCHES[:1])
    balance = attach(net, STRATEGY)
    for block in net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    _same(_window(net, balance, BATCHES[:1]), expected)
    assert _graphs() == 1
    no_recompilation()
    _same(_window(net, balance, BATCHES[:1]), expected)


def test_two_attached_models_share_a_graph_and_are_counted_apart(no_recompilation):
    first, second = _net(("softmax",)), _net(("softmax",), seed=1)
    one, other = attach(first, STRATEGY), attach(second, STRATEGY)
    for net in (first, second):
        net.blocks[0].compile(backend="aot_eager", fullgraph=True)
    expected = [_expected(_net(("softmax",), seed=seed), BATCHES) for seed in (0, 1)]
    for order in ((0, 1), (1, 0)):
        for index in order:
            net, balance = ((first, one), (second, other))[index]
            _same(_window(net, balance, BATCHES), expected[index])
    assert equipoise.metrics.max_violation(one.load) != equipoise.metrics.max_violation(other.load)
