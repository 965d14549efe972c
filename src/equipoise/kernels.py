"""Triton kernels for what is computed in each router call: one launch where plain operations take several.

They give the numbers of the plain path, which is what they are tested against. ``attach(..., fused=True)`` asks for
them; they run where Triton does, on a GPU, and on a CPU in Triton's interpreter (``TRITON_INTERPRET=1``). They are not
differentiable: for a second derivative the plain path is taken.

In all kernels a program goes over blocks of tokens, with all experts of a token at once. ``is_counted`` holds a number
for each token, 0 for a masked one; None: all count.
"""

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 4096  # numbers that a program holds at a time
MAX_PROGRAMS = 128
OCTAVES = 64  # of the histogram's bins
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IsCounted = Bool[Tensor, " tokens"] | Float[Tensor, " tokens"] | None


def can_take(values: Tensor) -> bool:
    """Whether the kernels can compute with these. They have no derivative, so not while one is recorded."""
    runs = values.device.type == "cuda" or IS_INTERPRETED
    return runs and type(values) is Tensor and values.numel() > 0 and not torch.is_grad_enabled()


def _launch(kernel: Any, num_tokens: int, num_experts: int, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel whose first arguments are the tensors, and whose next ones are the two sizes."""
    columns = triton.next_power_of_2(num_experts)
    rows = max(BLOCK // columns, 1)
    constants |= {"ROWS": rows, "COLUMNS": columns}
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, wherever the tensors are
        kernel[(num_programs(num_tokens, num_experts),)](*arguments, num_tokens, num_experts, **constants)


def num_programs(num_tokens: int, num_experts: int) -> int:
    rows = max(BLOCK // triton.next_power_of_2(num_experts), 1)
    return min(triton.cdiv(num_tokens, rows), MAX_PROGRAMS)


# ---- loads of sequences ----


def count_by_sequence(
    expert_ids: Int[Tensor, "tokens k"],
    sequence_ids: Int[Tensor, " tokens"],
    is_counted: IsCounted,
    num_sequences: int,
    num_experts: int,
    load: Int[Tensor, " experts"] | None = None,
) -> Int[Tensor, "sequences experts"]:
    """Assignments of each expert in each sequence, int32. Adds them to ``load`` too, if it is given."""
    by_sequence = torch.zeros(num_sequences, num_experts, dtype=torch.int32, device=expert_ids.device)
    num_tokens, k = expert_ids.shape
    tensors = (expert_ids.contiguous(), sequence_ids, is_counted, load, by_sequence, num_experts)
    _launch(_count_by_sequence, num_tokens, k, *tensors)
    return by_sequence


@triton.jit
def _count_by_sequence(
    expert_ids,
    sequence_ids,
    is_counted,
    load,
    by_sequence,
    num_experts,
    num_tokens,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    choice = tl.arange(0, COLUMNS)[None, :]
    for first in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        is_token = token < num_tokens
        if is_counted is not None:
            is_token = is_token & (tl.load(is_counted + token, mask=is_token, other=0) != 0)
        is_assignment = is_token[:, None] & (choice < k)
        expert = tl.load(expert_ids + token[:, None] * k + choice, mask=is_assignment, other=0)
        sequence = tl.load(sequence_ids + token, mask=is_token, other=0)
        tl.atomic_add(by_sequence + sequence[:, None] * num_experts + expert, 1, mask=is_assignment)
        if load is not None:
            one = tl.full((ROWS, COLUMNS), 1, tl.int64)
            tl.atomic_add(load + expert, one, mask=is_assignment)


# ---- losses ----


@triton.jit
def _read(values, is_counted, token, num_tokens, num_experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of rows; which numbers are in it, which count, and where they are."""
    expert = tl.arange(0, COLUMNS)[None, :]
    is_token = token < num_tokens
    is_number = is_token[:, None] & (expert < num_experts)
    place = token[:, None] * num_experts + expert
    block = tl.load(values + place, mask=is_number, other=0)
    does_count = is_number
    if is_counted is not None:
        does_count = is_number & (tl.load(is_counted + token, mask=is_token, other=0) != 0)[:, None]
    return block, is_number, does_count, place


@triton.jit
def _total(scores, tiny):
    total = tl.sum(scores, 1)[:, None]
    return tl.where(total < tiny, tiny, total)  # nan stays


@triton.jit
def _shares(
    by_sequence, sequence_ids, token, is_number, num_tokens, num_experts, COLUMNS: tl.constexpr, dtype: tl.constexpr
):
    """For each token ``E f_e`` of its sequence."""
    sequence = tl.load(sequence_ids + token, mask=token < num_tokens, other=0)
    place = sequence[:, None] * num_experts + tl.arange(0, COLUMNS)[None, :]
    load = tl.load(by_sequence + place, mask=is_number, other=0)
    num_assignments = tl.maximum(tl.sum(load, 1), 1)[:, None]
    return load.to(dtype) * (num_experts / num_assignments.to(dtype))


def masses(
    scores: Float[Tensor, "tokens experts"], is_counted: IsCounted, is_divided: bool
) -> Float[Tensor, "parts experts"]:
    """The sum of p over the tokens, in parts. p: the scores, divided by their sum if ``is_divided``."""
    num_tokens, num_experts = scores.shape
    parts = scores.new_empty(num_programs(num_tokens, num_experts), num_experts)
    tensors = (scores.contiguous(), is_counted, parts)
    _launch(_masses, num_tokens, num_experts, *tensors, is_divided=is_divided, tiny=_tiny(scores))
    return parts


@triton.jit
def _masses(
    scores, is_counted, parts, num_tokens, num_experts,
    is_divided: tl.constexpr, tiny: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, COLUMNS)
    mass = tl.zeros((COLUMNS,), scores.dtype.element_ty)
    for first in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        p, _, does_count, _ = _read(scores, is_counted, token, num_tokens, num_experts, ROWS, COLUMNS)
        if is_divided:
            p = p / _total(p, tiny)
        mass += tl.sum(tl.where(does_count, p, 0.0), 0)
    tl.store(parts + tl.program_id(0) * num_experts + expert, mass, mask=expert < num_experts)


def values_in_sequences(
    scores: Float[Tensor, "tokens experts"],
    is_counted: IsCounted,
    sequence_ids: Int[Tensor, " tokens"],
    by_sequence: Int[Tensor, "sequences experts"],
    is_divided: bool,
) -> Float[Tensor, " parts"]:
    """``sum_t sum_e E f_e p_te`` in float64, in parts: the loss within sequences, summed over the tokens."""
    num_tokens, num_experts = scores.shape
    parts = torch.empty(num_programs(num_tokens, num_experts), dtype=torch.float64, device=scores.device)
    tensors = (scores.contiguous(), is_counted, sequence_ids, by_sequence, parts)
    _launch(_values_in_sequences, num_tokens, num_experts, *tensors, is_divided=is_divided, tiny=_tiny(scores))
    return parts


@triton.jit
def _values_in_sequences(
    scores, is_counted, sequence_ids, by_sequence, parts, num_tokens, num_experts,
    is_divided: tl.constexpr, tiny: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((), tl.float64)
    for first in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        p, is_number, does_count, _ = _read(scores, is_counted, token, num_tokens, num_experts, ROWS, COLUMNS)
        if is_divided:
            p = p / _total(p, tiny)
        slope = _shares(by_sequence, sequence_ids, token, is_number, num_tokens, num_experts, COLUMNS, p.dtype)
        total += tl.sum(tl.sum(tl.where(does_count, p * slope, 0.0), 1).to(tl.float64), 0)
    tl.store(parts + tl.program_id(0), total)


def score_gradient(
    scores: Float[Tensor, "tokens experts"],
    is_counted: IsCounted,
    is_divided: bool,
    *,
    slopes: Float[Tensor, " experts"] | None = None,
    sequence_ids: Int[Tensor, " tokens"] | None = None,
    by_sequence: Int[Tensor, "sequences experts"] | None = None,
    scale: Float[Tensor, ""] | None = None,
    onto: Float[Tensor, "tokens experts"] | None = None,
) -> Float[Tensor, "tokens experts"]:
    """The gradient at the scores of a loss with the slopes ``slopes + scale * E f_e``, added to ``onto``.

    f_e is the share of an expert in the assignments of the token's sequence. Either part may be missing.
    """
    num_tokens, num_experts = scores.shape
    gradient = torch.empty_like(scores, memory_format=torch.contiguous_format)
    onto = None if onto is None else onto.contiguous()
    tensors = (scores.contiguous(), is_counted, onto, slopes, sequence_ids, by_sequence, scale, gradient)
    _launch(_score_gradient, num_tokens, num_experts, *tensors, is_divided=is_divided, tiny=_tiny(scores))
    return gradient


@triton.jit
def _score_gradient(
    scores, is_counted, onto, slopes, sequence_ids, by_sequence, scale, gradient, num_tokens, num_experts,
    is_divided: tl.constexpr, tiny: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = scores.dtype.element_ty
    expert = tl.arange(0, COLUMNS)[None, :]
    for first in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        p, is_number, does_count, place = _read(scores, is_counted, token, num_tokens, num_experts, ROWS, COLUMNS)
        slope = tl.zeros((ROWS, COLUMNS), dtype)
        if slopes is not None:
            slope += tl.load(slopes + expert, mask=expert < num_experts, other=0).to(dtype)
        if by_sequence is not None:
            shares = _shares(by_sequence, sequence_ids, token, is_number, num_tokens, num_experts, COLUMNS, dtype)
            slope += shares * tl.load(scale).to(dtype)
        if is_divided:
            total = _total(p, tiny)
            slope = (slope - tl.sum(p * slope, 1)[:, None] / total) / total
        slope = tl.where(does_count, slope, 0.0)
        if onto is not None:
            slope += tl.load(onto + place, mask=is_number, other=0).to(dtype)
        tl.store(gradient + place, slope, mask=is_number)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


# ---- quantile balancing ----


def margin_histogram(
    values: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"],
    k: int,
    is_counted: IsCounted,
    num_bins: int,
    smallest: int,
    drawn_by: Float[Tensor, "tokens experts"] | None = None,
    fraction: float = 1.0,
) -> Int[Tensor, "bins experts"]:
    """The histogram of ``a_t - v_te - b_e`` of each expert, int64; see ``Quantile`` for a_t.

    The bins are those of its edges: on both sides of 0 as many for each octave, from 2^smallest to 2^(smallest + 64).
    With ``drawn_by`` only a fraction of the tokens is added: those that ``Quantile`` draws by these numbers.
    """
    num_tokens, num_experts = values.shape
    mantissa_bits = (num_bins // 2 // OCTAVES).bit_length() - 1
    histogram = torch.zeros(num_bins, num_experts, dtype=torch.int64, device=values.device)
    drawn_by = None if drawn_by is None else drawn_by.float().contiguous()
    tensors = (values.contiguous(), bias, is_counted, drawn_by, histogram)
    first_exponent = (127 + smallest) << mantissa_bits
    constants = {"k": k, "half": num_bins // 2, "shift": 23 - mantissa_bits, "first_exponent": first_exponent}
    constants["drawn_below"] = math.ceil(fraction * 2**24)
    _launch(_margin_histogram, num_tokens, num_experts, *tensors, **constants)
    return histogram


@triton.jit
def _margin_histogram(
    values, bias, is_counted, drawn_by, histogram, num_tokens, num_experts,
    k: tl.constexpr, half: tl.constexpr, shift: tl.constexpr, first_exponent: tl.constexpr, drawn_below: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, COLUMNS)[None, :]
    b = tl.load(bias + expert, mask=expert < num_experts, other=0)
    for first in range(tl.program_id(0) * ROWS, num_tokens, tl.num_programs(0) * ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        value, is_number, does_count, place = _read(values, is_counted, token, num_tokens, num_experts, ROWS, COLUMNS)
        if drawn_by is not None:
            number = tl.load(drawn_by + place, mask=is_number, other=0).to(tl.int32, bitcast=True).to(tl.int64)
            mixed = tl.sum(number * (2 * expert.to(tl.int64) + 1) * 0x9E3779B97F4A7C1, 1)
            for _ in tl.static_range(2):
                mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
            does_count = does_count & (((mixed >> 33) & 0xFFFFFF) < drawn_below)[:, None]
        biased = tl.where(expert < num_experts, value + b, float("-inf"))
        rest = biased
        last = tl.max(rest, 1)
        for _ in range(k):  # takes the k largest out
            last = tl.max(rest, 1)
            rest = tl.where(expert == tl.argmax(rest, 1)[:, None], float("-inf"), rest)
        first_other = tl.max(rest, 1)
        threshold = first_other - (first_other - last) * 0.5
        margin = (threshold[:, None] - biased).to(tl.float32)
        is_below = margin < 0
        # As Quantile does on a CPU: a bin is the exponent and the first bits of the mantissa.
        bits = tl.abs(margin).to(tl.int32, bitcast=True) - is_below.to(tl.int32)
        bin = tl.minimum(tl.maximum((bits >> shift) - first_exponent, 0), half - 1)
        bin = tl.where(is_below, half - 1 - bin, half + bin)
        has_nan = tl.max((biased != biased).to(tl.int32), 1)[:, None] > 0
        bin = tl.where(has_nan, 2 * half - 1, bin)
        one = tl.full((ROWS, COLUMNS), 1, tl.int64)
        tl.atomic_add(histogram + bin * num_experts + expert, one, mask=does_count)
