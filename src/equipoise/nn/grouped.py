"""The arithmetic of routed SwiGLU experts: sort assignments by expert, multiply in groups, sum outputs by token.

Two movements of rows, each the backward of the other:

    dispatch [tokens, n] -> [assignments, n]    the row of each assignment's token, assignments sorted by expert
    collect  [assignments, n] -> [tokens, n]    the sum over a token's k assignments, in float32 or wider

So no gradient is accumulated in an order that may vary, and none starts as zeros of full size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import without_autocast

ROW_MULTIPLE = 32  # on a CPU, for dtypes narrower than float32; see _pad_rows


class Assignments(NamedTuple):
    """Assignment ``t * k + i`` is token t's i-th choice. Sorted by expert, each expert's are in token order."""

    order: Int[Tensor, " assignments"]  # the assignment at each sorted place
    inverse: Int[Tensor, " assignments"]  # the sorted place of each assignment
    ends: Int[Tensor, " experts"]  # int32: the end of each expert's places, which is the cumulative load
    k: int

    @property
    def begins(self) -> Int[Tensor, " experts"]:
        return F.pad(self.ends[:-1], (1, 0))


def sort_by_expert(expert_ids: Int[Tensor, "tokens k"], num_experts: int) -> Assignments:
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    if torch.compiler.is_compiling():
        inverse = order.argsort()  # Inductor of torch 2.13 may read a scatter's result before it is written
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
    """``sum_i weights[t, i] * expert_i(x_t)``,  expert(x) = (silu(g) * u) @ down,  g, u = halves of x @ gate_up

    All products are in ``x``'s dtype. The weights multiply the inner activations. The sum is the same, and the weights
    and their gradient do not need the experts' outputs.
    """
    pads = _needs_padding(x, assignments)
    order, inverse, ends, k = _pad_rows(assignments) if pads else assignments
    by_assignment = _Dispatch.apply(weights.reshape(-1, 1), order, inverse, 1)
    if pads:  # padding has weight 0, so it reaches no gradient
        by_assignment = by_assignment * torch.zeros_like(order, dtype=weights.dtype).index_fill_(0, inverse, 1)[:, None]
    inner = _grouped_mm(_Dispatch.apply(x, order, inverse, k), gate_up.to(x.dtype), ends)
    if torch.compiler.is_compiling():  # the compiler fuses it
        inner = swiglu(inner) * by_assignment.to(inner.dtype)
    else:
        inner = _WeightedSwiglu.apply(inner, by_assignment)
    return _Collect.apply(_grouped_mm(inner, down.to(x.dtype), ends), order, inverse, k)


def _needs_padding(x: Tensor, assignments: Assignments) -> bool:
    """Whether oneDNN would build a new kernel for every number of rows; loads differ in every call. Never under a
    compiler, because the number of padding rows depends on the data; no other shape does."""
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    is_eager = type(assignments.order) is Tensor and not torch.compiler.is_compiling()
    return narrow and is_eager and assignments.order.numel() > 0


def _pad_rows(assignments: Assignments) -> Assignments:
    """Pads each expert's rows to a multiple of ``ROW_MULTIPLE`` by repeating its first assignment. ``order`` includes
    the padding; ``inverse`` points to none of it."""
    order, inverse, ends, k = assignments
    load = ends - assignments.begins
    padded_load = (load + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    padded_ends = padded_load.cumsum(0, dtype=torch.int32)
    place = torch.arange(order.numel()) + (padded_ends - padded_load - assignments.begins).repeat_interleave(load)
    first = order[assignments.begins.clamp_max(order.numel() - 1)]
    padded = first.repeat_interleave(padded_load).index_copy_(0, place, order)
    return Assignments(padded, place[inverse], padded_ends, k)


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


class _WeightedSwiglu(torch.autograd.Function):
    """``swiglu(gate_up) * weights``, the weights [assignments, 1] rounded to the activations' dtype.

    Saves its inputs only, and writes both halves of ``gate_up``'s gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weights.to(gate_up.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        gate_up, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated
            y = swiglu(gate_up) * weights.to(gate_up.dtype)
            return torch.autograd.grad(y, (gate_up, weights), gradient, create_graph=True)
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        wide = torch.promote_types(weights.dtype, gate_up.dtype)
        grad_weights = (activated * up).mul_(gradient).sum(1, keepdim=True, dtype=wide).to(weights.dtype)
        gradient = gradient * weights.to(gate_up.dtype)
        torch.mul(gradient, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(gradient.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weights


def _grouped_mm(x: Float[Tensor, "rows n"], weight: Float[Tensor, "e n m"], ends: Int[Tensor, " e"]) -> Tensor:
    """``x[i] @ weight[e]`` for the rows i of expert e. Rows are sorted by expert; those of e end before ``ends[e]``."""
    dtypes = {torch.bfloat16}
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        dtypes |= {torch.float32, torch.float16}
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype in dtypes and aligned and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight, offs=ends)
    return _block_mm(x, weight, ends)


def _block_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Cuts each expert's rows into blocks of ``size`` and multiplies block by block. The last block of an expert also
    holds rows of others, which nobody reads."""
    num_rows, num_experts = x.shape[0], weight.shape[0]
    if num_rows == 0:
        return x @ weight[0]
    size = -(-num_rows // num_experts)
    num_blocks = 2 * num_experts  # sum_e ceil(load_e / size) < sum_e (load_e / size + 1) <= 2 * experts
    begins = F.pad(ends[:-1], (1, 0))
    last_block = ((ends - begins + size - 1) // size).cumsum(0)  # the first block after the expert's
    first_block = F.pad(last_block[:-1], (1, 0))
    block = torch.arange(num_blocks, device=x.device)
    expert = torch.searchsorted(last_block, block, right=True).clamp_max(num_experts - 1)
    start = begins[expert] + (block - first_block[expert]) * size
    row = start.unsqueeze(1) + torch.arange(size, device=x.device)  # (blocks, size)
    blocks = x.index_select(0, row.clamp_max(num_rows - 1).flatten()).view(num_blocks, size, -1)
    with without_autocast(x.device):  # like grouped_mm
        product = blocks @ weight.index_select(0, expert)
    place = torch.arange(num_rows, device=x.device)
    expert = torch.searchsorted(ends, place, right=True)
    return product.flatten(0, 1).index_select(0, first_block[expert] * size + place - begins[expert])
