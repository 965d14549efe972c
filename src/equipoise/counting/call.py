"""One counted router call, and what it shares with the other calls of its forward: mask and sequences.

These are fitted to the tokens of a call once a forward. The forms in which counting needs them are made when the first
layer asks for them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.load import sequence_load
from equipoise.routing import Routing

if TYPE_CHECKING:
    from equipoise.counting.window import MicroBatch


class FittedMask:
    """Which tokens of a router call count."""

    def __init__(self, mask: Tensor):
        # A copy: the caller may change it, and a compiled graph reuses its memory.
        self.is_counted: Bool[Tensor, " tokens"] = mask.clone() if mask.dtype == torch.bool else mask != 0
        self._assignments: dict[int, Tensor] = {}  # by k

    @cached_property
    def masked(self) -> Bool[Tensor, "tokens 1"]:
        """True for the others."""
        return ~self.is_counted[:, None]

    @cached_property
    def numbers(self) -> Float[Tensor, " tokens"]:
        """1 for a token that counts, 0 for the others."""
        return self.is_counted.float()

    @cached_property
    def num_tokens(self) -> Int[Tensor, ""]:
        """How many count."""
        return self.is_counted.sum()

    def assignments(self, k: int) -> Int[Tensor, " assignments"]:
        """1 for each of the k assignments of a token that counts, 0 for those of the others."""
        if k not in self._assignments:
            self._assignments[k] = self.is_counted.long()[:, None].expand(-1, k).reshape(-1)
        return self._assignments[k]

    def end(self) -> None:
        """The forward has ended."""
        self._assignments.clear()


class Sequences:
    """Which sequence each token of a router call is in.

    ``num_sequences`` is how many there are, or more if it ``is_bound``: the host does not wait for a GPU to ask it.
    ``length`` is that of every sequence, if they are whole rows one after the other; else 0.
    """

    def __init__(self, ids: Int[Tensor, " tokens"], num_sequences: int, length: int = 0, is_bound: bool = False):
        self.ids, self.num_sequences, self.length, self.is_bound = ids, num_sequences, length, is_bound
        self._cells: dict[int, Tensor] = {}  # by number of experts

    def _first_cells(self, num_experts: int) -> Int[Tensor, "tokens 1"]:
        """Where the row of a token's sequence begins in a flat table [sequences, experts]."""
        if num_experts not in self._cells:
            self._cells[num_experts] = (self.ids * num_experts)[:, None]
        return self._cells[num_experts]

    def end(self) -> None:
        """The forward has ended."""
        self._cells.clear()

    def sum(self, values: Float[Tensor, "tokens experts"]) -> Float[Tensor, "sequences experts"]:
        if self.length:
            return values.view(self.num_sequences, self.length, -1).sum(1)
        return values.new_zeros(self.num_sequences, values.shape[-1]).index_add_(0, self.ids, values)

    def spread(self, rows: Float[Tensor, "sequences experts"]) -> Float[Tensor, "tokens experts"]:
        """To each token the row of its sequence."""
        if self.length:
            return rows[:, None].expand(-1, self.length, -1).reshape(len(self.ids), -1)
        return rows[self.ids]

    def load(
        self, expert_ids: Int[Tensor, "tokens k"], num_experts: int, mask: FittedMask | None
    ) -> Int[Tensor, "sequences experts"]:
        """Assignments of each expert in each sequence."""
        load = torch.zeros(self.num_sequences, num_experts, dtype=torch.int64, device=expert_ids.device)
        ones = None if mask is None else mask.assignments(expert_ids.shape[-1])
        if self.length:
            by_row = expert_ids.reshape(self.num_sequences, -1)
            load.scatter_add_(1, by_row, self._one.expand_as(by_row) if ones is None else ones.view_as(by_row))
        else:
            cells = (self._first_cells(num_experts) + expert_ids).reshape(-1)
            load.view(-1).scatter_add_(0, cells, self._one.expand_as(cells) if ones is None else ones)
        return load

    @cached_property
    def _one(self) -> Int[Tensor, ""]:
        return torch.ones((), dtype=torch.int64, device=self.ids.device)


@dataclass(eq=False, slots=True)
class CountedCall:
    """One router call that was counted. What is known of its tokens may come at the end of its forward only."""

    number: int  # in its window
    layer: int
    micro_batch: "MicroBatch"
    num_routed: int  # tokens, masked ones included
    needs_gradient: bool  # its logits are differentiated
    has_differentiable_gradient: bool = False  # its backward was one with create_graph
    mask: FittedMask | None = None
    sequences: Sequences | None = None
    sequence_load: Int[Tensor, "sequences experts"] | None = None  # if the number of sequences is known

    @property
    def num_tokens(self) -> Tensor | int:
        """Unmasked ones."""
        return self.num_routed if self.mask is None else self.mask.num_tokens

    def count_by_kernel(
        self, expert_ids: Int[Tensor, "tokens k"], num_experts: int, load: Int[Tensor, " experts"] | None = None
    ) -> Int[Tensor, "sequences experts"]:
        """The load by sequence, of a call whose sequences are known. Adds the call to ``load`` too, if it is given."""
        from equipoise import kernels

        assert self.sequences is not None
        is_counted = None if self.mask is None else self.mask.is_counted
        sequences = self.sequences
        return kernels.count_by_sequence(
            expert_ids, sequences.ids, is_counted, sequences.num_sequences, num_experts, load
        )

    def load_by_sequence(self, routing: Routing) -> Int[Tensor, "sequences experts"]:
        if self.sequences is None:
            return sequence_load(routing)  # raises: it says what is missing
        return self.sequences.load(routing.expert_ids, routing.scores.shape[-1], self.mask)
