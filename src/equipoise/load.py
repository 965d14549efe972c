"""choice -> load: how many assignments each expert got. Counts are integers, and no function waits for a GPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import Routing, check_mask

__all__ = ["expert_load", "sequence_load"]


def _ones(expert_ids: Tensor, mask: Tensor | None) -> Int[Tensor, " assignments"]:
    """1 for each assignment of a token that counts, 0 for the others."""
    one = torch.ones((), dtype=torch.int64, device=expert_ids.device) if mask is None else (mask != 0).long()[:, None]
    return one.expand_as(expert_ids).reshape(-1)


def expert_load(
    expert_ids: Int[Tensor, "tokens k"], num_experts: int, mask: Float[Tensor, " tokens"] | None = None
) -> Int[Tensor, " experts"]:
    """Assignments of each expert, int64: ``c_e = #{(t, i) : expert_ids[t, i] = e, mask_t != 0}``.

    The counts sum to k times the number of tokens that count. Where we differ from public code: int64, because float32
    stops counting at 2^24 and bfloat16 at 2^8; a scatter, because bincount makes the host wait for a GPU.

    Args:
        expert_ids: the choice of each token, integers.
        num_experts: experts of the layer.
        mask: 1 for a token that counts, 0 for padding; default: all count.

    Raises:
        ValueError: ``expert_ids`` or ``mask`` has another shape or type.
        RuntimeError: an id is not from 0 to ``num_experts`` - 1 (on a GPU an assertion of the device).

    Examples:
        >>> expert_ids = torch.tensor([[0, 1], [1, 2], [1, 2]])
        >>> expert_load(expert_ids, num_experts=4, mask=torch.tensor([1, 1, 0]))
        tensor([1, 2, 1, 0])
    """
    if expert_ids.dim() != 2:
        raise ValueError(f"expert_ids must have the shape (tokens, k): got {tuple(expert_ids.shape)}.")
    if expert_ids.is_floating_point() or expert_ids.dtype == torch.bool:
        raise ValueError(f"expert_ids must be integers: got {expert_ids.dtype}. Pass the indices of the top-k.")
    check_mask(mask, expert_ids.shape[0])
    load = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    return load.scatter_add_(0, expert_ids.reshape(-1).long(), _ones(expert_ids, mask))


def sequence_load(routing: Routing) -> Int[Tensor, "sequences experts"]:
    """Assignments of each expert in each sequence, int64. A sequence without tokens has a row of zeros.

    Args:
        routing: what a router call decided, with ``sequence_ids``.

    Raises:
        ValueError: ``sequence_ids`` is missing or does not fit.
    """
    if routing.sequence_ids is None:
        raise ValueError(
            "sequence_ids must say which token belongs to which sequence: got none. Give the model (batch, sequence) "
            "input, or pass them with balance.token_mask(mask, sequence_ids)."
        )
    num_tokens, num_sequences, num_experts = len(routing.expert_ids), routing.num_sequences, routing.scores.shape[-1]
    if routing.sequence_ids.shape != (num_tokens,) or num_sequences < min(1, num_tokens):
        raise ValueError(
            "sequence_ids must hold one number per token, below num_sequences: got shape "
            f"{tuple(routing.sequence_ids.shape)} for {num_tokens} tokens and {num_sequences=}. Give every "
            "token a number from 0, and num_sequences above the largest."
        )
    cell = routing.sequence_ids[:, None] * num_experts + routing.expert_ids
    load = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=cell.device)
    load.scatter_add_(0, cell.reshape(-1), _ones(routing.expert_ids, routing.mask))
    return load.view(num_sequences, num_experts)
