"""What has been counted between two optimizer steps: calls, micro-batches, a window, pooled over ranks.

All counts of a micro-batch lie in one int64 vector,

    [ load of layer 0 | load of layer 1 | ... | tokens of each layer | closings, closing count, micro-batch number ]

so that one all-reduce pools every layer. The last three say which collective this rank is in: a rank that closes the
window while another begins a micro-batch is found out by every rank. What balancers want to know besides the load,
their statistics, is added up beside it and pooled with it when the window closes.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.errors import EquipoiseError

__all__ = ["Call", "Closed", "Layout", "MicroBatch", "Pool", "Statistics", "Window", "fit_mask", "number_sequences"]


class Layout:
    """Where each layer's numbers lie in a vector."""

    def __init__(self, num_experts: Sequence[int]):
        self.num_experts = tuple(num_experts)
        ends = list(itertools.accumulate(num_experts))
        self.slices = [slice(end - size, end) for size, end in zip(num_experts, ends, strict=True)]
        self.num_layers = len(num_experts)
        self.tokens = slice(ends[-1], ends[-1] + self.num_layers)
        self.header = slice(self.tokens.stop, self.tokens.stop + 3)

    def zeros(self, device: torch.device) -> Int[Tensor, " numbers"]:
        with torch.inference_mode(False):  # counts outlive an evaluation under inference mode
            return torch.zeros(self.header.stop, dtype=torch.int64, device=device)

    def load(self, vector: Tensor, layer: int) -> Int[Tensor, " experts"]:
        return vector[self.slices[layer]]

    def count(self, vector: Tensor, layer: int, expert_ids: Tensor, mask: Tensor | None) -> None:
        """Adds one call, in place: k assignments for each unmasked token. No synchronisation."""
        ids = expert_ids.reshape(-1)
        if mask is None:
            ones = torch.ones((), dtype=torch.int64, device=ids.device).expand_as(ids)
            tokens: Tensor | int = expert_ids.shape[0]
        else:
            unmasked = mask.long()
            ones = unmasked[:, None].expand_as(expert_ids).reshape(-1)
            tokens = unmasked.sum()
        self.load(vector, layer).scatter_add_(0, ids, ones)
        vector[self.tokens.start + layer].add_(tokens)


class Pool:
    """The ranks whose counts are pooled, on a process group of our own, so that no call pairs with anybody else's."""

    def __init__(self, group: Any | None):
        self.size, self.group = 1, None
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise EquipoiseError(
                "group must hold this rank: it is a group of other ranks. Attach on the ranks of the group only."
            )
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self.size = len(ranks)
        if self.size > 1:
            self.group = dist.new_group(ranks, use_local_synchronization=True)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's Python value, in rank order."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def all_reduce(self, vector: Tensor) -> Any:
        """Begins to sum ``vector`` over the ranks in place; ``wait()`` on what comes back, None on a single rank."""
        return None if self.group is None else dist.all_reduce(vector, group=self.group, async_op=True)


class Statistics:
    """What balancers count besides the load, by (layer, number of the balancer): summed, or put one after another."""

    def __init__(self, gathered: Sequence[bool]):
        self.gathered = gathered
        self.values: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode(False)  # they outlive it
    def add(self, layer: int, balancer: int, value: Tensor) -> None:
        self._put(layer, balancer, value.clone(memory_format=torch.contiguous_format))  # what came is the balancer's

    def merge(self, other: "Statistics") -> None:
        """Takes over what ``other`` holds."""
        for (layer, balancer), value in other.values.items():
            self._put(layer, balancer, value)

    def _put(self, layer: int, balancer: int, value: Tensor) -> None:
        there = self.values.get((layer, balancer))
        if there is None:
            self.values[layer, balancer] = value
        elif self.gathered[balancer]:
            self.values[layer, balancer] = torch.cat([there, value])
        else:
            there.add_(value)

    @property
    def summed(self) -> list[Tensor]:
        """Those that are summed, in the same order on every rank."""
        return [self.values[key] for key in sorted(self.values) if not self.gathered[key[1]]]

    def gather(self, pool: Pool) -> None:
        """Puts the ranks' values one after another where they are not summed."""
        keys = [key for key in sorted(self.values) if self.gathered[key[1]]]
        if keys and pool.size > 1:
            everyone = pool.gather([self.values[key].cpu() for key in keys])
            for index, key in enumerate(keys):
                rows = torch.cat([values[index] for values in everyone])
                self.values[key] = rows.to(self.values[key].device)


class Call(NamedTuple):
    """One counted router call of ``layer``."""

    layer: int
    micro_batch: "MicroBatch"
    mask: Float[Tensor, " tokens"] | None
    sequence_ids: Int[Tensor, " tokens"] | None
    num_sequences: int
    num_tokens: Tensor | int


class MicroBatch:
    """What was counted between two calls of ``loss()``, on this rank. Calls are known by their number in the window."""

    def __init__(self, vector: Tensor, num_layers: int, num_losses: int, statistics: Statistics):
        self.vector = vector
        self.statistics = statistics  # handed to the window when this micro-batch closes
        self.calls: list[list[int]] = [[] for _ in range(num_layers)]
        self.unserved: list[list[int]] = [[] for _ in range(num_layers)]  # calls whose backward has not run yet
        self.choices: dict[int, Tensor] = {}  # expert ids of unserved calls
        self.first_layer: int | None = None
        self.factor: Tensor | None = None  # what the caller multiplied the loss with, known in the backward
        # by loss and layer, its sum over the tokens
        self.dtype = torch.float32  # of the losses, or wider
        with torch.inference_mode(False):
            self.losses = vector.new_zeros(num_losses, num_layers, dtype=torch.float64)

    def find(self, layer: int, expert_ids: Tensor) -> int:
        """Which unserved call of ``layer`` was made again: of several, the one that chose most alike, or the last.

        Backwards run from the last call to the first, but not every call has one.
        """
        calls = self.unserved[layer]
        if len(calls) == 1:
            return calls[0]
        alike = [
            int((self.choices[c] == expert_ids).sum())
            if c in self.choices and self.choices[c].shape == expert_ids.shape
            else -1
            for c in calls
        ]
        return max(zip(alike, calls, strict=True))[1]

    def serve(self, factor: Tensor) -> None:
        """A ticket's backward has run: the backwards of this micro-batch's routers follow."""
        self.factor = factor
        self.unserved = [list(calls) for calls in self.calls]


class Closed(NamedTuple):
    """What a window ends with, over all ranks."""

    vector: Int[Tensor, " numbers"]
    statistics: Statistics


class Window:
    """The open window: its micro-batches and their pooled counts.

    ``gathered`` says of each balancer whether its statistics are put one after another; ``close_statistics(vector,
    statistics)`` is called with the counts of every micro-batch that closes and adds what depends on them.
    """

    def __init__(
        self,
        layout: Layout,
        pool: Pool,
        num_losses: int,
        pools_each: bool,
        gathered: Sequence[bool],
        close_statistics: Callable[[Tensor, Statistics], None],
    ):
        self.layout = layout
        self.pool = pool
        self.num_losses = num_losses
        self.pools_each = pools_each and pool.size > 1  # pool every micro-batch, since a loss waits for it
        self.gathered = gathered
        self.close_statistics = close_statistics
        self.number = -1
        self._open()

    def _open(self) -> None:
        self.number += 1
        self.micro_batches: list[MicroBatch] = []
        self.current: MicroBatch | None = None
        self.serving: MicroBatch | None = None  # the one whose ticket's backward ran last
        self.calls: list[Call] = []
        self._statistics = Statistics(self.gathered)  # of the closed micro-batches, on this rank
        self._closed: Tensor | None = None  # sum of the closed micro-batches, over the ranks if pools_each
        self._pending: list[tuple[Any, Tensor]] = []

    def micro_batch(self, device: torch.device) -> MicroBatch:
        if self.current is None:
            with torch.inference_mode(False):  # counts outlive it
                vector, statistics = self.layout.zeros(device), Statistics(self.gathered)
                self.current = MicroBatch(vector, self.layout.num_layers, self.num_losses, statistics)
            self.micro_batches.append(self.current)
        return self.current

    def record(self, call: Call, expert_ids: Tensor) -> int:
        """Keeps a call and returns its token, which its backward brings back."""
        number, micro_batch = len(self.calls), call.micro_batch
        self.calls.append(call)
        micro_batch.calls[call.layer].append(number)
        micro_batch.unserved[call.layer].append(number)
        if self.num_losses:
            micro_batch.choices[number] = expert_ids.to(torch.int16)  # a copy: a compiled graph reuses its buffers
        if micro_batch.first_layer is None:
            micro_batch.first_layer = call.layer
        return self.number << 32 | number

    def call(self, token: int) -> tuple[int, Call]:
        """The number and the call of a token; one of another window is an error."""
        if token >> 32 != self.number:
            raise EquipoiseError(
                "a backward must run before step() closes its window: it ran after. Call balance.step() after the "
                "optimizer's step."
            )
        number = token & 0xFFFFFFFF
        return number, self.calls[number]

    @torch.inference_mode(False)  # counts outlive it
    def close_micro_batch(self) -> MicroBatch | None:
        """Ends the current micro-batch and begins to pool it where a loss needs the pooled counts."""
        closed, self.current = self.current, None
        if closed is not None:
            self.close_statistics(closed.vector, closed.statistics)
            self._statistics.merge(closed.statistics)
            closed.statistics = Statistics(self.gathered)
            vector = closed.vector.clone()
            if self.pools_each:
                vector[self.layout.header.stop - 1] = len(self.micro_batches)
                self._pending.append((self.pool.all_reduce(vector), vector))
            else:
                self._add(vector)
        return closed

    def _add(self, vector: Tensor) -> None:
        self._closed = vector if self._closed is None else self._closed.add_(vector)

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for work, _ in pending:
            work.wait()
        for _, vector in pending:
            self._check(vector)
            self._add(vector)

    def _check(self, vector: Tensor) -> None:
        closings, closing_count, number = vector[self.layout.header].tolist()
        if closings > self.pool.size:
            raise EquipoiseError(
                "every attached router must be called on every rank between two steps: on another rank one was not, "
                "and its step() raised. Its message names the router."
            )
        if 0 < closings < self.pool.size:
            begins = self.pool.size - closings
            raise EquipoiseError(
                "every rank must have the same number of micro-batches in a window when a loss pools over the window: "
                f"{closings} rank(s) closed it after {closing_count // closings} micro-batches, {begins} rank(s) began "
                f"micro-batch {number // begins}. Give all ranks equally many, or use pooling=previous."
            )

    @property
    def load_now(self) -> Tensor | None:
        """The counts known at this moment without waiting for anybody."""
        if self.current is None:
            return self._closed
        return self.current.vector if self._closed is None else self._closed + self.current.vector

    def load_pooled(self) -> Tensor:
        """The counts of all closed micro-batches, over all ranks; waits for what is under way."""
        self._wait()
        assert self._closed is not None
        return self._closed

    def fail(self, device: torch.device) -> None:
        """This rank cannot close the window: where the others wait for it, they are told and raise too."""
        if self.pools_each:
            vector = self.layout.zeros(device)
            vector[self.layout.header.start] = self.pool.size + 1
            self.pool.all_reduce(vector).wait()

    def close(self) -> Closed:
        """Ends the window: its counts and statistics over all ranks, in one collective; where every micro-batch is
        pooled, in one for the closing and one for statistics, if there are any."""
        self.close_micro_batch()
        if self.pools_each:
            self._wait()
            assert self._closed is not None
            vector = torch.zeros_like(self._closed)
        else:
            assert self._closed is not None
            vector = self._closed
        statistics = self._statistics
        if self.pool.size > 1:
            header, summed = self.layout.header, statistics.summed
            vector[header.start], vector[header.start + 1], vector[header.stop - 1] = 1, len(self.micro_batches), 0
            if self.pools_each:  # the others may begin a micro-batch: what is exchanged has its size
                self.pool.all_reduce(vector).wait()
                self._check(vector)
                vector = self._closed.new_zeros(0)
            if vector.numel() or summed:
                together = torch.cat([vector, *(value.reshape(-1) for value in summed)])
                self.pool.all_reduce(together).wait()
                vector, *pooled = together.split([vector.numel(), *(value.numel() for value in summed)])
                for value, total in zip(summed, pooled, strict=True):
                    value.copy_(total.view_as(value))
            vector = self._closed if self.pools_each else vector
            statistics.gather(self.pool)
        for micro_batch in self.micro_batches:
            micro_batch.choices.clear()
        self._open()
        return Closed(vector, statistics)


def fit_mask(
    mask: Tensor | None, num_tokens: int, rows: int, name: str, device: torch.device
) -> Float[Tensor, " tokens"] | None:
    """The mask of these tokens, 0 or 1, a copy. Of a 2-D mask that covers a cached prefix too the end counts."""
    if mask is None:
        return None
    if mask.dim() == 2 and mask.numel() > num_tokens and num_tokens % mask.shape[0] == 0:
        mask = mask[:, -(num_tokens // mask.shape[0]) :]
    if mask.numel() != num_tokens:
        raise EquipoiseError(
            f"the mask must hold one number per token that {name} routes: got shape {tuple(mask.shape)} for "
            f"{num_tokens} tokens. Pass the mask of these tokens with balance.token_mask(mask)."
        )
    if mask.dim() == 2 and 1 < rows == mask.shape[1] != mask.shape[0] > 1:
        raise EquipoiseError(
            f"the mask must have a row for each of the {rows} rows of the batch: got shape {tuple(mask.shape)}, which "
            "has them as columns. Pass mask.T, in the order in which the tokens are routed."
        )
    return (mask.to(device).reshape(-1) != 0).float()


def number_sequences(
    sequence_ids: Tensor | None, rows: int, num_tokens: int, device: torch.device
) -> tuple[Int[Tensor, " tokens"] | None, int]:
    """Numbers the sequences 0, 1, ...: rows of the batch, or wherever the given ids change."""
    if sequence_ids is not None:
        ids = sequence_ids.reshape(1, -1) if sequence_ids.dim() == 1 else sequence_ids
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if starts.numel() != num_tokens:
            raise EquipoiseError(
                f"sequence_ids must hold one number per token: got shape {tuple(sequence_ids.shape)} for {num_tokens} "
                "tokens. Pass those of these tokens with balance.token_mask(mask, sequence_ids)."
            )
        return starts.reshape(-1).cumsum(0).sub_(1).to(device), num_tokens
    if num_tokens == 0:
        return torch.zeros(0, dtype=torch.int64, device=device), 0
    if rows <= 0 or num_tokens % rows:
        return None, 0
    return torch.arange(num_tokens, device=device) // (num_tokens // rows), rows
