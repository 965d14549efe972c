"""Reads the arguments of a model's forward: its rows and their length, padding, and where sequences begin."""

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from equipoise.errors import EquipoiseError

PREDICTS_FURTHER = re.compile("mtp|nextn|multi_?token", re.IGNORECASE)  # names of multi-token prediction
_TOKENS = ("input_ids", "inputs_embeds")  # the arguments of Transformers that hold one entry per token
_POSITIONS = ("position_ids", "positions", "input_pos")
# By token, the number of its sequence.
_SEGMENTS = ("seq_idx", "segment_ids", "document_ids", "document_id", "doc_ids", "sequence_ids")
_ENDS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")  # 0, then the end of each sequence of queries


def argument_names(module: nn.Module) -> list[str]:
    """Of its forward. Looked up once for all modules of a class, except for those with a forward on the instance."""
    if "forward" in module.__dict__:
        return list(inspect.signature(module.forward).parameters)
    return _parameter_names(type(module).forward)[1:]


@cache
def _parameter_names(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)


def rows_and_length(arguments: Mapping[str, Any], is_sequence_first: bool = False) -> tuple[int, int]:
    """The rows of the batch, and how many tokens each has. 0 for what the arguments do not show.

    ``is_sequence_first`` says that a forward takes hidden states as ``[sequence, batch, dim]``.
    """
    num_tokens = _num_flat_tokens(arguments)
    for name in (*_TOKENS, *arguments):
        value = arguments.get(name)
        if isinstance(value, Tensor) and (value.dim() >= 3 or (value.dim() == 2 and not value.is_floating_point())):
            first, second = value.shape[:2]
            if name not in _TOKENS and num_tokens not in (None, first, first * second):
                continue  # a grid of patches, an index: it is not about the tokens
            if value.dim() == 3 and name not in _TOKENS and is_sequence_first:
                return second, first
            # An image has four dimensions, and the second are its channels.
            return first, second if value.dim() < 4 else 0
    return 0, 0


def _num_flat_tokens(arguments: Mapping[str, Any]) -> int | None:
    """The tokens of a forward whose first tensor is ``[tokens]`` or hidden states ``[tokens, dim]``; else None."""
    first = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    if first is None or any(arguments.get(name) is not None for name in _TOKENS):
        return None
    is_flat = first.dim() == 1 or (first.dim() == 2 and first.is_floating_point())
    return first.shape[0] if is_flat else None


def flat_tokens(arguments: Mapping[str, Any]) -> int:
    """How many tokens a forward without rows takes: ``[tokens]`` or ``[tokens, dim]``; 0 if it takes none."""
    tokens = next((arguments[name] for name in _TOKENS if arguments.get(name) is not None), None)
    if isinstance(tokens, Tensor):
        return tokens.shape[0] if tokens.dim() == 1 else 0
    return _num_flat_tokens(arguments) or 0


def sequence_length(arguments: Mapping[str, Any]) -> int:
    """The length of the rows of ``input_ids`` or ``inputs_embeds``; 0 without them."""
    tokens = next((arguments[name] for name in _TOKENS if arguments.get(name) is not None), None)
    return tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() >= 2 else 0


def has_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward goes on from earlier tokens, which a mask covers too."""
    caches = (value for name, value in arguments.items() if "past" in name or "cache" in name)
    return any(value is not None and not isinstance(value, bool) for value in caches)


def padding_argument(arguments: Mapping[str, Any]) -> Any:
    """The attention mask. Transformers also takes one for each kind of attention, in a mapping."""
    mask = arguments.get("attention_mask")
    return mask.get("full_attention") if isinstance(mask, Mapping) else mask


def sequence_starts(
    arguments: Mapping[str, Any], rows: int, length: int, true_hides: bool = False
) -> Bool[Tensor, "rows length"] | None:
    """Where a sequence begins, by every form in which the arguments of a forward show it. None: they show nothing.

    The forms are: ``position_ids`` that are 0 or fall, a change of ``seq_idx`` or of a mask that numbers its segments,
    the ends in ``cu_seq_lens``, and a mask of queries and keys under which a token may not attend to the one before it.
    A row begins a sequence in any case. Raises ``EquipoiseError`` for a form that cannot be read. ``true_hides``: in a
    mask of queries and keys, True says that a token may not attend, as in Megatron.
    """
    shape = (rows, length)
    packed = arguments.get("packed_seq_params")  # of Megatron
    if packed is not None:
        arguments = {**arguments, "cu_seqlens_q": getattr(packed, "cu_seqlens_q", None)}
    forms = [
        *(_from_positions(arguments.get(name), shape) for name in _POSITIONS),
        *(_from_segments(arguments.get(name), shape, name) for name in _SEGMENTS),
        *(_from_ends(arguments.get(name), shape, name) for name in _ENDS),
        _from_mask(padding_argument(arguments), shape, "attention_mask", true_hides),
        *(_from_mask(mask, shape, name, true_hides) for name, mask in arguments.items() if _is_other_mask(name, mask)),
    ]
    starts: Tensor | None = None
    for form in forms:
        if form is not None:
            starts = form if starts is None else starts | form.to(starts.device)
    return starts


def numbered(starts: Bool[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """The sequences numbered 0, 1, ..., from where they start."""
    return starts.reshape(-1).cumsum(0).sub_(1).view(starts.shape)


def _unreadable(name: str, came: str) -> EquipoiseError:
    return EquipoiseError(
        "a loss of scope sequence must know where each sequence begins: the forward was called with "
        f"{name} {came}, which equipoise cannot read. Say it before the forward with balance.token_mask(mask, "
        "sequence_ids)."
    )


def changes(ids: Tensor) -> Bool[Tensor, "rows length"]:
    """Where a row begins, and where its ids change."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts


def _from_positions(positions: Any, shape: tuple[int, int]) -> Tensor | None:
    if not isinstance(positions, Tensor):
        return None
    if positions.dim() == 1:
        positions = positions[None]
    if positions.dim() not in (2, 3) or positions.shape[-1] != shape[1]:
        return None  # says nothing about these tokens
    if positions.dim() == 3:  # one plane per axis: text begins where all are zero
        starts = (positions == 0).all(0)
    else:
        starts = positions == 0  # tokens of an image may share a position
        starts[:, 1:] |= positions[:, 1:] < positions[:, :-1]
    starts = starts.expand(shape).clone()  # models broadcast positions over the rows
    starts[:, 0] = True
    return starts


def _from_segments(ids: Any, shape: tuple[int, int], name: str) -> Tensor | None:
    if not isinstance(ids, Tensor):
        return None
    if ids.dim() == 1:
        ids = ids[None]
    if tuple(ids.shape) != shape:
        raise _unreadable(name, f"of shape {tuple(ids.shape)} for {shape[0]} rows of {shape[1]} tokens")
    return changes(ids)


def _from_ends(ends: Any, shape: tuple[int, int], name: str) -> Tensor | None:
    if ends is None:
        return None
    ends = torch.as_tensor(ends)
    if ends.dim() != 1:
        raise _unreadable(name, f"of shape {tuple(ends.shape)}")
    tokens = torch.arange(shape[0] * shape[1], device=ends.device)
    return changes(torch.searchsorted(ends.to(tokens.dtype).contiguous(), tokens, right=True).view(shape))


def _is_other_mask(name: str, value: Any) -> bool:
    """Whether an argument of another name says which token may attend to which."""
    is_square = isinstance(value, Tensor) and value.dim() in (3, 4) and value.shape[-1] == value.shape[-2]
    is_mask = "mask" in name and name != "attention_mask"
    return is_mask and (is_square or type(value).__name__ == "BlockMask")


def _from_mask(mask: Any, shape: tuple[int, int], name: str, true_hides: bool) -> Tensor | None:
    if mask is None or isinstance(mask, Mapping):
        return None
    if not isinstance(mask, Tensor):
        raise _unreadable(name, f"of type {type(mask).__name__}")
    if mask.dim() == 1:  # of a flat forward
        mask = mask[None]
    if mask.dim() == 2:
        is_number = not (mask.is_floating_point() or mask.dtype == torch.bool)
        return _from_numbered_mask(mask) if is_number and tuple(mask.shape) == shape else None
    is_square = mask.dim() in (3, 4) and tuple(mask.shape[-2:]) == (shape[1], shape[1])
    if not is_square or mask.shape[0] not in (1, shape[0]):
        return None  # of a cache, whose tokens belong to one sequence per row
    to_previous = (mask if mask.dim() == 3 else mask[:, 0]).diagonal(-1, -2, -1)
    hides = true_hides or mask.is_floating_point()  # floats are added to the scores
    is_seen = to_previous == 0 if hides else to_previous.bool()
    starts = torch.ones(shape, dtype=torch.bool, device=mask.device)
    starts[:, 1:] = ~is_seen
    return starts


def _from_numbered_mask(mask: Tensor) -> Tensor:
    """1 1 2 2 0 numbers two packed sequences. A zero inside a sequence does not end it."""
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last_unmasked = torch.where(mask != 0, places, 0).cummax(1).values
    return changes(mask.gather(1, last_unmasked))
