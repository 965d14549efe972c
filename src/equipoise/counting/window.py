"""What has been counted between two optimizer steps: calls, micro-batches, a window, pooled over ranks.

What balancers want to know besides the load, their statistics, is added up beside it and pooled with it when the window
closes. See ``Exchange`` for what travels.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.counting.exchange import Exchange
from equipoise.counting.pool import Pool
from equipoise.errors import EquipoiseError
from equipoise.load import Layout, outliving

__all__ = ["Call", "Closed", "MicroBatch", "Statistics", "Window", "fit_mask", "number_sequences"]

MANY = 256  # micro-batches of a window: hardly anybody accumulates as many, so step() is forgotten

_log = logging.getLogger("equipoise")


class Statistics:
    """What balancers count besides the load, by (layer, number of the balancer): summed, or put one after another."""

    def __init__(self, gathered: Sequence[bool]):
        self.gathered = gathered
        self.values: dict[tuple[int, int], Tensor] = {}

    def add(self, layer: int, balancer: int, value: Tensor) -> None:
        with outliving():
            self._put(
                layer, balancer, value.clone(memory_format=torch.contiguous_format)
            )  # what came is the balancer's

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

    def gather(self, exchange: Exchange) -> None:
        """Puts the ranks' values one after another where they are not summed."""
        keys = [key for key in sorted(self.values) if self.gathered[key[1]]]
        if keys:
            everyone = exchange.gather([self.values[key].cpu() for key in keys])
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
    wants_gradient: bool = False  # its logits are differentiated


class MicroBatch:
    """What was counted between two calls of ``loss()``, on this rank. Calls are known by their number in the window."""

    def __init__(self, vector: Tensor, num_layers: int, num_losses: int, statistics: Statistics):
        self.vector = vector
        self.statistics = statistics  # handed to the window when this micro-batch closes
        self.calls: dict[int, list[int]] = {}  # by layer that was called
        self.unserved: dict[int, list[int]] = {}  # those of them whose backward has not run yet
        self.choices: dict[int, Tensor] = {}  # expert ids of unserved calls
        self.first_layer: int | None = None
        self.factor: Tensor | None = None  # what the caller multiplied the loss with, known in the backward
        self.dtype = torch.float32  # of the losses, or wider
        # by loss and layer, its sum over the tokens
        self.losses = vector.new_zeros(num_losses, num_layers, dtype=torch.float64) if num_losses else vector[:0]

    def find(self, layer: int, expert_ids: Tensor) -> int:
        """Which unserved call of ``layer`` was made again: of several, the one that chose most alike, or the last.

        Backwards run from the last call to the first, but not every call has one.
        """
        calls = self.unserved[layer]
        return calls[0] if len(calls) == 1 else max((self._alike(call, expert_ids), call) for call in calls)[1]

    def alike(self, layer: int, expert_ids: Tensor) -> int:
        """How many choices the unserved call of ``layer`` that is most alike has in common with these."""
        return max(self._alike(call, expert_ids) for call in self.unserved[layer])

    def _alike(self, call: int, expert_ids: Tensor) -> int:
        chosen = self.choices.get(call)
        return -1 if chosen is None or chosen.shape != expert_ids.shape else int((chosen == expert_ids).sum())

    def serve(self, factor: Tensor) -> None:
        """A ticket's backward has run: the backwards of this micro-batch's routers follow."""
        self.factor = factor
        self.unserved = {layer: list(calls) for layer, calls in self.calls.items()}


class Closed(NamedTuple):
    """What a window ends with, over all ranks."""

    vector: Int[Tensor, " numbers"]
    statistics: Statistics
    applied: bool | Tensor  # whether the optimizer's step was applied on every rank
    collectives: int
    num_bytes: int  # that this rank gave to them


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
        self.exchange = Exchange(layout, pool, pools_each)
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
        self.exchange.reset()

    def micro_batch(self, device: torch.device) -> MicroBatch:
        if self.current is None:
            with outliving():
                vector, statistics = self.layout.zeros(device), Statistics(self.gathered)
                self.current = MicroBatch(vector, self.layout.num_layers, self.num_losses, statistics)
            self.micro_batches.append(self.current)
            if len(self.micro_batches) == MANY:
                _log.warning(
                    f"{MANY} micro-batches were counted since step() was called last, and nothing was moved. Call "
                    "balance.step() after every optimizer step, or once balance.follow(optimizer); run a model that is "
                    "not trained in eval() or inside balance.paused()."
                )
        return self.current

    def record(self, call: Call, expert_ids: Tensor) -> int:
        """Keeps a call and returns its token, which its backward brings back."""
        number, micro_batch = len(self.calls), call.micro_batch
        self.calls.append(call)
        micro_batch.calls.setdefault(call.layer, []).append(number)
        micro_batch.unserved.setdefault(call.layer, []).append(number)
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

    def close_micro_batch(self) -> MicroBatch | None:
        """Ends the current micro-batch and begins to pool it where a loss needs the pooled counts."""
        closed, self.current = self.current, None
        if closed is not None:
            with outliving():
                self.close_statistics(closed.vector, closed.statistics)
                self._statistics.merge(closed.statistics)
                closed.statistics = Statistics(self.gathered)
                vector = closed.vector[: self.exchange.width]
                if self.exchange.pools_each:
                    vector = vector.clone()
                    self._pending.append((self.exchange.begin(vector, len(self.micro_batches)), vector))
                else:
                    self._add(vector)
        return closed

    def _add(self, vector: Tensor) -> None:
        """Never in place: the first is a micro-batch's own."""
        self._closed = vector if self._closed is None else self._closed + vector

    def _receive(self) -> None:
        while self._pending:
            work, vector = self._pending.pop(0)
            self.exchange.receive(vector, work)
            self._add(vector)

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """A window in which a rank failed cannot be closed on any: all of them begin the next."""
        try:
            yield
        except EquipoiseError:
            self._open()
            raise

    def load_now(self, layer: int) -> Int[Tensor, " experts"]:
        """The counts of a layer of the open micro-batch, with those known at this moment without waiting."""
        assert self.current is not None
        load = self.layout.load(self.current.vector, layer)
        return load if self._closed is None else self.layout.load(self._closed, layer) + load

    def load_pooled(self) -> Tensor:
        """The counts of all closed micro-batches, over all ranks; waits for what is under way."""
        with self._dropped_on_error():
            self._receive()
        assert self._closed is not None
        return self._closed

    def fail(self, device: torch.device, statistics: Statistics) -> None:
        """This rank cannot close the window. Where others wait for it they are told, and all drop it."""
        if self.pool.size > 1:
            self.exchange.fail(device, statistics.summed)
            self._open()

    def close(self, applied: bool | Tensor = True, absent: Statistics | None = None) -> Closed:
        """Ends the window: its counts, its statistics and whether its step was applied, over all ranks, in one
        collective; where every micro-batch is pooled, in one for the closing and one for statistics, if there are any.

        ``absent`` stands in for the statistics of layers that were not called here: every rank gives as many.
        """
        with self._dropped_on_error():
            self.close_micro_batch()
            for key, value in ({} if absent is None else absent.values).items():
                self._statistics.values.setdefault(key, value)
            self._receive()
            assert self._closed is not None
            vector, statistics = self._closed, self._statistics
            if self.pool.size > 1:
                vector, applied = self.exchange.close(vector, statistics.summed, applied, len(self.micro_batches))
                statistics.gather(self.exchange)
        for micro_batch in self.micro_batches:
            micro_batch.choices.clear()
        closed = Closed(vector, statistics, applied, self.exchange.collectives, self.exchange.num_bytes)
        self._open()
        return closed


def fit_mask(
    mask: Tensor | None, num_tokens: int, rows: int, name: str, device: torch.device
) -> Float[Tensor, " tokens"] | None:
    """The mask of these tokens, 0 or 1, a copy. Of a 2-D mask that covers a cached prefix too the end counts."""
    if mask is None:
        return None
    has_rows = mask.dim() == 2 and rows in (0, mask.shape[0])
    if has_rows and mask.numel() > num_tokens and num_tokens % mask.shape[0] == 0:
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
