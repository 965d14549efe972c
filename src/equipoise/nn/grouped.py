"""The arithmetic of routed SwiGLU experts: assignments sorted by expert, grouped products, outputs summed by token.

Two movements, each the backward of the other, so neither gradient is added up in an order that may vary and none
begins as zeros of full size:

    dispatch [tokens, n] -> [assignments, n]    row a is that of assignment a's token, assignments sorted by expert
    collect  [assignments, n] -> [tokens, n]    the sum over a token's k assignments, in float32 or wider

No shape depends on the data, except on a CPU, and the host never waits for a GPU.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import without_autocast

__all__ = ["Assignments", "sort_by_expert", "swiglu", "swiglu_experts"]


ROWS = 32  # of a product on a CPU in less than float32, a multiple; see _filled_up


class Assignments(NamedTuple):
    """Assignment ``t * k + i`` is token t's i-th choice; sorted, those of an expert lie together, in token order."""

    order: Int[Tensor, " assignments"]  # at each sorted place the assignment
    inverse: Int[Tensor, " assignments"]  # of each assignment its sorted place
    ends: Int[Tensor, " experts"]  # int32: where each expert's places end; the cumulative load
    k: int

    @property
    def begins(self) -> Int[Tensor, " experts"]:
        return F.pad(self.ends[:-1], (1, 0))


def sort_by_expert(expert_ids: Int[Tensor, "tokens k"], num_experts: int) -> Assignments:
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    if torch.compiler.is_compiling():
        inverse = order.argsort()  # Inductor of torch 2.13 may read what is scattered before it is written
    else:
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    experts = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    return Assignments(order, inverse, ends, expert_ids.shape[1])


def swiglu_experts(
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens k"],
    assignments: Assignments,
    gate_up: Float[Tensor, "experts dim twice_hidden"],
    down: Float[Tensor, "experts hidden dim"],
) -> Float[Tensor, "tokens dim"]:
    """sum_i weights[t, i] * expert_i(x_t),  expert(x) = (silu(g) * u) @ down,  g, u = halves of x @ gate_up

    All products are in ``x``'s dtype. The weights multiply the inner activations: that is the same sum, and neither
    they nor their gradient need the experts' outputs again.
    """
    filled = _is_compiled_for_its_rows(x, assignments)
    order, inverse, ends, k = _filled_up(assignments) if filled else assignments
    by_assignment = _Dispatch.apply(weights.reshape(-1, 1), order, inverse, 1)
    if filled:  # what fills up weighs nothing, so neither does it reach a gradient
        by_assignment = by_assignment * torch.zeros_like(order, dtype=weights.dtype).index_fill_(0, inverse, 1)[:, None]
    inner = _grouped_mm(_Dispatch.apply(x, order, inverse, k), gate_up.to(x.dtype), ends)
    y = _grouped_mm(_weighted_swiglu(inner, by_assignment), down.to(x.dtype), ends)
    return _Collect.apply(y, order, inverse, k)


def _is_compiled_for_its_rows(x: Tensor, assignments: Assignments) -> bool:
    """Whether a product of this dtype is made anew for every number of rows, as oneDNN does; and loads are other ones
    at every call. Not where somebody compiles: how many rows fill up depends on the data."""
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    real = type(assignments.order) is Tensor and not torch.compiler.is_compiling()
    return narrow and real and assignments.order.numel() > 0


def _filled_up(assignments: Assignments) -> Assignments:
    """Each expert's places filled up to a multiple of ``ROWS``, with its first assignment; ``order`` is longer by
    them, and ``inverse`` leads to none of them."""
    order, inverse, ends, k = assignments
    load = ends - assignments.begins
    whole = (load + ROWS - 1) // ROWS * ROWS
    whole_ends = whole.cumsum(0, dtype=torch.int32)
    place = torch.arange(order.numel()) + (whole_ends - whole - assignments.begins).repeat_interleave(load)
    first = order[assignments.begins.clamp_max(order.numel() - 1)]
    filled = first.repeat_interleave(whole).index_copy_(0, place, order)
    return Assignments(filled, place[inverse], whole_ends, k)


def swiglu(gate_up: Float[Tensor, "tokens twice_hidden"]) -> Float[Tensor, "tokens hidden"]:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Collect.apply(gradient, *ctx.saved_tensors, ctx.k), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.k = k
        if k == 1:
            return y.index_select(0, inverse)
        starts = torch.arange(0, inverse.numel(), k, device=y.device)
        return torch.embedding_bag(y, inverse, starts)[0]  # gathers and adds in one pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Dispatch.apply(gradient, *ctx.saved_tensors, ctx.k), None, None, None


def _weighted_swiglu(
    gate_up: Float[Tensor, "assignments twice_hidden"], weights: Float[Tensor, "assignments 1"]
) -> Float[Tensor, "assignments hidden"]:
    """``swiglu(gate_up) * weights``, the weights rounded to the activations' dtype."""
    if torch.compiler.is_compiling():
        return swiglu(gate_up) * weights.to(gate_up.dtype)  # the compiler makes one pass of it
    return _WeightedSwiglu.apply(gate_up, weights)


class _WeightedSwiglu(torch.autograd.Function):
    """Keeps its inputs only, and writes both halves of their gradient where they belong."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weights.to(gate_up.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated
            y = swiglu(gate_up) * weights.to(gate_up.dtype)
            of_gate_up, of_weights = torch.autograd.grad(y, (gate_up, weights), gradient, create_graph=True)
            return of_gate_up, of_weights
        gate, up = gate_up.chunk(2, dim=-1)
        of_gate_up = torch.empty_like(gate_up)
        of_gate, of_up = of_gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        wide = torch.promote_types(weights.dtype, gate_up.dtype)
        of_weights = (activated * up).mul_(gradient).sum(1, keepdim=True, dtype=wide).to(weights.dtype)
        gradient = gradient * weights.to(gate_up.dtype)
        torch.mul(gradient, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient.mul_(up), gate, grad_input=of_gate)
        return of_gate_up, of_weights


def _grouped_mm(
    x: Float[Tensor, "assignments n"], weight: Float[Tensor, "experts n m"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "assignments m"]:
    """``x[i] @ weight[e]``: rows are sorted by expert, those of expert e end before ``ends[e]``."""
    dtypes = {torch.bfloat16}
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        dtypes |= {torch.float32, torch.float16}
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype in dtypes and aligned and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight, offs=ends)
    return _block_mm(x, weight, ends)


def _block_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows in whole blocks of ``size``, the last one filled up with rows that nobody reads; one product
    a block."""
    num_rows, num_experts = x.shape[0], weight.shape[0]
    if num_rows == 0:
        return x @ weight[0]
    size = -(-num_rows // num_experts)
    num_blocks = 2 * num_experts  # sum_e ceil(load_e / size) < sum_e (load_e / size + 1) <= 2 * experts
    begins = F.pad(ends[:-1], (1, 0))
    last_block = ((ends - begins + size - 1) // size).cumsum(0)  # the first one that is not the expert's
    first_block = F.pad(last_block[:-1], (1, 0))
    block = torch.arange(num_blocks, device=x.device)
    expert = torch.searchsorted(last_block, block, right=True).clamp_max(num_experts - 1)
    start = begins[expert] + (block - first_block[expert]) * size
    row = start.unsqueeze(1) + torch.arange(size, device=x.device)  # (blocks, size)
    blocks = x.index_select(0, row.clamp_max(num_rows - 1).flatten()).view(num_blocks, size, -1)
    with without_autocast(x.device):  # as grouped_mm
        product = blocks @ weight.index_select(0, expert)
    place = torch.arange(num_rows, device=x.device)
    expert = torch.searchsorted(ends, place, right=True)
    return product.flatten(0, 1).index_select(0, first_block[expert] * size + place - begins[expert])
