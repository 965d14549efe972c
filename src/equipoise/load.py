"""choice -> load: how many assignments each expert got. Integer counts, no synchronisation with a GPU."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import Routing

__all__ = ["Layout", "expert_load", "outliving", "sequence_load"]


def outliving() -> AbstractContextManager[Any]:
    """Where counts are made: they outlive an evaluation under inference mode, so they must not be of it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _ones(expert_ids: Tensor, mask: Tensor | None) -> Tensor:
    one = torch.ones((), dtype=torch.int64, device=expert_ids.device) if mask is None else (mask != 0).long()[:, None]
    return one.expand_as(expert_ids).reshape(-1)


def expert_load(
    expert_ids: Int[Tensor, "tokens k"], num_experts: int, mask: Float[Tensor, " tokens"] | None = None
) -> Int[Tensor, " experts"]:
    """Assignments of each expert, int64: ``c_e = sum over t with mask_t != 0 of #{slots of t that hold e}``.

    They sum to k times the tokens that count.

    Where we differ from public code: int64 instead of float32 or bfloat16, which stop counting at 2^24 and 2^8; a
    scatter instead of bincount, which makes the host wait for a GPU.

    >>> expert_load(torch.tensor([[0, 1], [1, 2], [1, 2]]), num_experts=4, mask=torch.tensor([1.0, 1.0, 0.0]))
    tensor([1, 2, 1, 0])
    """
    if expert_ids.dim() != 2:
        raise ValueError(f"expert_ids must have the shape (tokens, k): got {tuple(expert_ids.shape)}.")
    if expert_ids.is_floating_point() or expert_ids.dtype == torch.bool:
        raise ValueError(f"expert_ids must be integers: got {expert_ids.dtype}. Pass the indices of the top-k.")
    if mask is not None and mask.shape != expert_ids.shape[:1]:
        raise ValueError(
            f"mask must hold one number per token: expected shape ({expert_ids.shape[0]},), got {tuple(mask.shape)}."
        )
    load = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    return load.scatter_add_(0, expert_ids.reshape(-1).long(), _ones(expert_ids, mask))


def sequence_load(routing: Routing) -> Int[Tensor, "sequences experts"]:
    """Assignments of each expert in each sequence, int64; rows of sequences that do not occur are zero."""
    if routing.sequence_ids is None:
        raise ValueError(
            "counting by sequence needs to know which token belongs to which sequence: got none. Give the model "
            "(batch, sequence) input, or say it with balance.token_mask(mask, sequence_ids)."
        )
    if routing.sequence_ids.shape != routing.expert_ids.shape[:1] or routing.num_sequences < min(
        1, len(routing.expert_ids)
    ):
        raise ValueError(
            f"sequence_ids must hold one number per token, below num_sequences: got shape "
            f"{tuple(routing.sequence_ids.shape)} for {routing.expert_ids.shape[0]} tokens and "
            f"num_sequences={routing.num_sequences}."
        )
    num_experts = routing.scores.shape[-1]
    cell = routing.sequence_ids[:, None] * num_experts + routing.expert_ids
    load = torch.zeros(routing.num_sequences * num_experts, dtype=torch.int64, device=cell.device)
    load.scatter_add_(0, cell.reshape(-1), _ones(routing.expert_ids, routing.mask))
    return load.view(routing.num_sequences, num_experts)


class Layout:
    """Where each layer's numbers lie in the one int64 vector that holds all counts of a micro-batch,

        [ load of layer 0 | load of layer 1 | ... | closings, closing count, micro-batch number | tokens of each layer ]

    so that one all-reduce of its beginning pools every layer. The three in the middle are for ``Exchange``.
    """

    def __init__(self, num_experts: Sequence[int]):
        self.num_experts = tuple(num_experts)
        ends = list(itertools.accumulate(num_experts))
        self.slices = [slice(end - size, end) for size, end in zip(num_experts, ends, strict=True)]
        self.num_layers = len(num_experts)
        self.loads = slice(0, ends[-1] if ends else 0)
        self.header = slice(self.loads.stop, self.loads.stop + 3)
        self.tokens = slice(self.header.stop, self.header.stop + self.num_layers)

    def zeros(self, device: torch.device) -> Int[Tensor, " numbers"]:
        with outliving():
            return torch.zeros(self.tokens.stop, dtype=torch.int64, device=device)

    def block(self, layers: Sequence[int]) -> slice | None:
        """Where the loads of these layers lie, one after another and of one size; None where they do not."""
        slices = [self.slices[layer] for layer in layers]
        if len({self.num_experts[layer] for layer in layers}) != 1:
            return None
        if any(a.stop != b.start for a, b in itertools.pairwise(slices)):
            return None
        return slice(slices[0].start, slices[-1].stop)

    def load(self, vector: Tensor, layer: int) -> Int[Tensor, " experts"]:
        return vector[self.slices[layer]]

    def count(self, vector: Tensor, layer: int, expert_ids: Tensor, mask: Tensor | None) -> None:
        """Adds one call, in place: k assignments for each unmasked token. No synchronisation."""
        ids, load = expert_ids.reshape(-1), self.load(vector, layer)
        tokens: Tensor | int = expert_ids.shape[0]
        if mask is None and ids.device.type == "cpu":
            load.add_(torch.bincount(ids, minlength=len(load)))  # a GPU would be waited for
        elif mask is None:
            load.scatter_add_(0, ids, torch.ones((), dtype=torch.int64, device=ids.device).expand_as(ids))
        else:
            unmasked = (mask != 0).long()
            load.scatter_add_(0, ids, unmasked[:, None].expand_as(expert_ids).reshape(-1))
            tokens = unmasked.sum()
        vector[self.tokens.start + layer].add_(tokens)
