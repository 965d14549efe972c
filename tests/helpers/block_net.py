"""A model with blocks that are called in many ways, and the exact counts, gradients and biases of its windows.

Counts are compared with numbers worked out by hand, gradients with the float64 loops of ``reference.py``
(``exact_window``).
"""

from copy import deepcopy
from functools import cache, partial
from typing import NamedTuple

import reference
import torch
from models import DIM, EXPERTS, VOCAB, Block, K
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from windows import assert_gradients_close, clone_gradients, random_ids

COEFFICIENTS = {"global_batch": 0.5, "sequence": 0.3, "micro_batch": 0.2}
RATE = 0.1
STRATEGY = f"loss-free:rate={RATE}+" + "+".join(f"lbl:scope={s},coefficient={c}" for s, c in COEFFICIENTS.items())
RULES = {"sigmoid": reference.sign_rule, "softmax": reference.proportional_rule}
ORDERS = ("plain", "forwards_first")


# ---- the model ----


def block(kind, experts=EXPERTS, k=K):
    """A block of the tiny model with any number of experts."""
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


class BlockNet(nn.Module):
    """Calls its blocks in any order, each with its own kind of checkpoint.

    ``mtp_block`` is the index of a block that predicts one token further. It runs last and in training only. It sees
    the hidden states of all positions but the last, plus the embeddings of all tokens but the first, so its router
    gets one token less of every row.

    ``dropped_block`` is the index of a block that is skipped if the first row ends with padding.

    ``checkpointing`` has one entry for each call (see ``_call``), the last for ``mtp_block``. None: no checkpoint.
    """

    def __init__(self, blocks, order=None, mtp_block=None, dropped_block=None):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(blocks)
        self.order = list(range(len(blocks))) if order is None else order
        self.mtp_block = mtp_block
        if mtp_block is not None:
            self.mtp = self.blocks[mtp_block]  # by its name it is known to predict further
        self.dropped_block = dropped_block
        self.checkpointing = [None] * (len(self.order) + 1)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids)
        may_checkpoint = self.training and torch.is_grad_enabled()
        for place, index in enumerate(self.order):
            if index == self.dropped_block and not mask[0, -1]:
                continue
            x = _call(self.blocks[index], x, self.checkpointing[place] if may_checkpoint else None)
        loss = _masked_mean(x, mask)
        if self.mtp_block is not None and self.training:
            shifted = x[:, :-1] + self.embed(input_ids[:, 1:])
            kind = self.checkpointing[-1] if may_checkpoint else None
            loss = loss + _masked_mean(_call(self.blocks[self.mtp_block], shifted, kind), mask[:, 1:])
        return loss


def _masked_mean(x, mask):
    return (x.float().square().mean(-1) * mask).sum() / mask.sum().clamp_min(1)


def save_matmuls(context, op, *args, **kwargs):
    is_saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def save_router(context, op, *args, **kwargs):
    aten = torch.ops.aten
    is_saved = op in (aten.mm.default, aten.sigmoid.default, aten._softmax.default, torch.ops.equipoise.tap.default)
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def save_tap(context, op, *args, **kwargs):
    is_saved = op is torch.ops.equipoise.tap.default
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.MUST_RECOMPUTE


def prefer_recompute(context, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


def must_recompute(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


def _call(block, x, kind):
    """``kind`` is None, a name, or the policy of a selective checkpoint."""
    if kind is None:
        return block(x)
    if kind in ("reentrant", "non_reentrant"):
        return checkpoint(block, x, use_reentrant=kind == "reentrant")
    if kind in ("nested_reentrant", "nested_non_reentrant"):
        is_reentrant = kind == "nested_reentrant"
        return checkpoint(partial(checkpoint, block, use_reentrant=is_reentrant), x, use_reentrant=is_reentrant)
    if kind == "mixed":  # a reentrant checkpoint inside a non-reentrant one
        return checkpoint(partial(checkpoint, block, use_reentrant=True), x, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, kind)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def block_net(kinds=("sigmoid", "softmax"), seed=0, **options):
    """``kinds``: one for each block, a score function or (score function, experts, k)."""
    torch.manual_seed(seed)
    return BlockNet([block(*kind) if isinstance(kind, tuple) else block(kind) for kind in kinds], **options).train()


def routers_of(net):
    """By layer, its router and score function."""
    return {
        f"blocks.{i}.gate": (block.gate, "sigmoid" if hasattr(block.gate, "e_score_correction_bias") else "softmax")
        for i, block in enumerate(net.blocks)
    }


def count_router_runs(net):
    """A list that grows by one with every router call, recomputations included."""
    runs = []
    for router, _ in routers_of(net).values():
        router.register_forward_hook(lambda *_: runs.append(1))
    return runs


# ---- its micro-batches ----


class Batch(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


PADDED_RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])  # 8 tokens of 14
PADDED_LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # 12 tokens of 14
BATCHES = [
    Batch(random_ids(seed=1)),
    Batch(random_ids(seed=2), PADDED_RIGHT),
    Batch(random_ids(seed=3), PADDED_LEFT),
]
ALL_MASKED = [  # for a single graph: every batch has a mask
    Batch(ids, torch.ones_like(ids) if mask is None else mask) for ids, mask in BATCHES
]
TOKENS = 14 + 8 + 12


# ---- its windows ----


class Outcome(NamedTuple):
    loads: dict
    gradients: dict
    biases: dict


def exact_window(net, batches, order="plain"):
    """What a window of ``batches``, each of equal weight, must give from biases of zero. ``net`` is not attached.

    Two passes: first the choices of all micro-batches, then the gradients of the losses by the float64 loops. A plain
    copy of the model carries these from the logits to the parameters.
    """
    net = deepcopy(net)
    net.checkpointing = [None] * len(net.checkpointing)
    routers, outputs = routers_of(net), []
    for name, (router, _) in routers.items():
        router.register_forward_hook(lambda m, a, output, name=name: outputs.append((name, output[0], output[2])))
    passes = []
    for batch in batches:
        outputs.clear()
        loss = net(*batch)
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        calls = {name: [] for name in routers}
        for name, logits, ids in outputs:
            call_mask = mask if ids.shape[0] == mask.numel() else mask[:, 1:]
            calls[name].append((logits, ids.tolist(), call_mask.reshape(-1).tolist(), ids.shape[0] // mask.shape[0]))
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
            known_counts = counts[name] if order == "forwards_first" else counts[name][: number + 1]
            pooled = [sum(column) for column in zip(*known_counts, strict=True)]
            by_scope = {
                "global_batch": reference.load_balancing_gradient(rows, pooled, score_function, mask),
                "micro_batch": reference.load_balancing_gradient(rows, counts[name][number], score_function, mask),
                "sequence": reference.sequence_gradient(rows, ids, sequences, score_function, mask),
            }
            total = sum(c * torch.tensor(by_scope[scope], dtype=torch.float64) for scope, c in COEFFICIENTS.items())
            for logits, gradient in zip(
                [c[0] for c in calls[name]], total.split([len(c[1]) for c in calls[name]]), strict=True
            ):
                if logits.requires_grad:
                    roots.append(logits)
                    factors.append((gradient / len(batches)).to(logits.dtype))
    torch.autograd.backward(roots, factors)
    loads = {name: [sum(column) for column in zip(*counts[name], strict=True)] for name in routers}
    biases = {
        name: torch.tensor(RULES[score_function]([0.0] * len(loads[name]), loads[name], RATE, True))
        for name, (_, score_function) in routers.items()
    }
    return Outcome(loads, clone_gradients(net), biases)


@cache
def exact_default_window(order):
    """``exact_window`` of ``block_net()`` and ``BATCHES``."""
    return exact_window(block_net(), BATCHES, order)


def run_window(net, balance, batches, order="plain", forward=None, before=lambda number: None):
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
    return Outcome(loads, clone_gradients(net), balance.biases)


def assert_same_outcome(outcome, expected):
    assert outcome.loads == expected.loads, f"a token was counted twice or not at all: {outcome.loads}"
    assert_gradients_close(outcome.gradients, expected.gradients)
    for name, bias in expected.biases.items():
        assert_close(outcome.biases[name], bias, rtol=0, atol=1e-6)  # float32 sums of a few terms


def sums(loads):
    return [int(sum(load)) for load in loads.values()]
