"""Where each layer's numbers are in the one vector that holds the counts of a micro-batch."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["Layout", "outside_inference_mode"]


def outside_inference_mode() -> AbstractContextManager[Any]:
    """For tensors that outlive the forward: a tensor made in inference mode could not be changed later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Layout:
    """The layout of an int64 vector of counts,

        [ load of layer 0 | load of layer 1 | ... | three numbers for ``Exchange`` | tokens of each layer ]

    so that one all-reduce of its beginning pools every layer. The three numbers, summed over the ranks: how many ranks
    close the window; how many micro-batches these had; the others' micro-batch numbers.
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
        with outside_inference_mode():
            return torch.zeros(self.tokens.stop, dtype=torch.int64, device=device)

    def block(self, layers: Sequence[int]) -> slice | None:
        """Where the loads of these layers are, if they are adjacent and of equal size; else None."""
        slices = [self.slices[layer] for layer in layers]
        if len({self.num_experts[layer] for layer in layers}) != 1:
            return None
        if any(a.stop != b.start for a, b in itertools.pairwise(slices)):
            return None
        return slice(slices[0].start, slices[-1].stop)

    def load(self, vector: Tensor, layer: int) -> Int[Tensor, " experts"]:
        """The load of one layer. A view."""
        return vector[self.slices[layer]]

    def num_tokens(self, vector: Tensor) -> Int[Tensor, " layers"]:
        """The unmasked tokens of every layer. A view."""
        return vector[self.tokens]

    def count(self, vector: Tensor, layer: int, expert_ids: Tensor, mask: Tensor | None) -> None:
        """Adds one call, in place: k assignments for each unmasked token. Waits for no GPU."""
        ids, load = expert_ids.reshape(-1), self.load(vector, layer)
        num_tokens: Tensor | int = expert_ids.shape[0]
        if mask is None and ids.device.type == "cpu":
            load.add_(torch.bincount(ids, minlength=len(load)))  # on a GPU bincount would make the host wait
        elif mask is None:
            load.scatter_add_(0, ids, torch.ones((), dtype=torch.int64, device=ids.device).expand_as(ids))
        else:
            unmasked = (mask != 0).long()
            load.scatter_add_(0, ids, unmasked[:, None].expand_as(expert_ids).reshape(-1))
            num_tokens = unmasked.sum()
        vector[self.tokens.start + layer].add_(num_tokens)
