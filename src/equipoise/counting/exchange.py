"""What the ranks of a pool send each other about a window: counts, and in them what else each must know of the others.

Where the window is pooled once, the loads alone travel. Where every micro-batch is, three numbers go with them and say
which collective this rank is in: a rank that closes the window while another begins a micro-batch is found out by every
rank. The rest is told inside the loads, which are never below 0 nor near 2^48:

    first load     + 2^48 for a rank whose optimizer skipped its step
    second load    + 2^48 for a rank that is at the end of ``measuring()``, and not in a window
    last load      - 2^62 / ranks for a rank that cannot go on

What comes is looked at on a CPU at once. From a GPU it is copied without a wait, and looked at before the next
collective begins: so the host waits for nothing, and no rank begins a collective that the others will not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.counting.pool import Pool
from equipoise.errors import EquipoiseError
from equipoise.load import Layout

__all__ = ["MARK", "Exchange"]

MARK = 2**48


class Exchange:
    """The collectives of one attached model, in the order in which every rank begins them.

    Attributes:
        pools_each: whether every micro-batch is pooled, since a loss waits for it.
        width: how many of a vector's numbers travel.
        collectives, num_bytes: begun since ``reset``, and what this rank gave to them; not those of ``measure``.
    """

    def __init__(self, layout: Layout, pool: Pool, pools_each: bool):
        self.layout, self.pool = layout, pool
        self.pools_each = pools_each and pool.size > 1
        self.width = layout.header.stop if self.pools_each else layout.loads.stop
        self._second, self._last = min(1, layout.loads.stop - 1), layout.loads.stop - 1
        self._unread: list[tuple[Tensor, Any, bool]] = []  # what the ranks told, on its way from a GPU
        self.reset()

    def reset(self) -> None:
        self.collectives, self.num_bytes = 0, 0

    def begin(self, counts: Tensor, number: int) -> Any:
        """Begins to sum the counts of a micro-batch, the window's ``number``-th, in place; see ``receive``."""
        counts[self.layout.header.stop - 1] = number
        return self._all_reduce(counts)

    def receive(self, counts: Tensor, work: Any) -> None:
        """Waits for the counts of a micro-batch, and takes in what the ranks told with them."""
        work.wait()
        self._look(counts)

    def close(
        self, counts: Tensor, statistics: Sequence[Tensor], applied: bool | Tensor, num_micro_batches: int
    ) -> tuple[Tensor, bool | Tensor]:
        """Ends a window: its counts over the ranks, and whether its step was applied on all of them. Sums the
        statistics in place."""
        closing = torch.zeros_like(counts) if self.pools_each else counts.clone()
        if isinstance(applied, Tensor):
            closing[0] += (~applied.to(closing.device).bool()).long() * MARK
        elif not applied:
            closing[0] += MARK
        if self.pools_each:  # the others may begin a micro-batch: what is exchanged has its size
            header = self.layout.header
            closing[header.start], closing[header.start + 1] = 1, num_micro_batches
            self._all_reduce(closing).wait()
        else:
            self._sum([closing, *statistics])
        self._look(closing)
        if self.pools_each and statistics:
            self._sum(statistics, reads=False)  # what the closing told is still on its way
        skips = closing[0] >> 48
        if closing.device.type == "cpu":
            applied = not int(skips)
        else:  # bad news moves nothing before it is read
            good = (closing[self._last] >= 0) & (closing[self._second] < MARK)
            if self.pools_each:
                good &= closing[self.layout.header.start] == self.pool.size
            applied = (skips == 0) & good
        closing[0] &= MARK - 1
        return counts if self.pools_each else closing, applied

    def measure(self, counts: Tensor) -> None:
        """Sums what an evaluation counted, in place."""
        if self.pool.size == 1 or not self.layout.num_layers:
            return
        vector = counts[: self.width]
        vector[self._second] += MARK
        before = self.collectives, self.num_bytes
        self._all_reduce(vector).wait()
        self.collectives, self.num_bytes = before
        self._look(vector, measuring=True)
        self.read()  # who measures looks at the result now
        vector[self._second] &= MARK - 1

    def fail(self, device: torch.device, statistics: Sequence[Tensor] = ()) -> None:
        """This rank cannot go on: the others, who wait for it, are told and raise too.

        ``statistics`` are those of a window without tokens: what the others exchange has their size.
        """
        if self.pool.size > 1 and self.layout.num_layers:
            vector = self.layout.zeros(device)[: self.width]
            vector[self._last] = -(2**62 // self.pool.size)
            self._sum([vector, *([] if self.pools_each else statistics)])

    def gather(self, value: Any) -> list[Any]:
        """Everybody's Python value, in rank order."""
        self.read()
        before = self.pool.collectives
        everyone = self.pool.gather(value)
        self.collectives += self.pool.collectives - before
        return everyone

    def read(self) -> None:
        """Raises if a collective brought bad news that nobody looked at yet."""
        unread, self._unread = self._unread, []
        for told, event, measuring in unread:
            event.synchronize()
            self._check(told.tolist(), measuring)

    def _all_reduce(self, vector: Tensor, reads: bool = True) -> Any:
        if reads:
            self.read()
        collectives, num_bytes = self.pool.collectives, self.pool.num_bytes
        work = self.pool.all_reduce(vector)
        self.collectives += self.pool.collectives - collectives
        self.num_bytes += self.pool.num_bytes - num_bytes
        return work

    def _sum(self, values: Sequence[Tensor], reads: bool = True) -> None:
        """Sums tensors over the ranks, in place, in one collective."""
        if len(values) == 1:
            self._all_reduce(values[0], reads).wait()
            return
        together = torch.cat([value.reshape(-1) for value in values])
        self._all_reduce(together, reads).wait()
        for value, total in zip(values, together.split([value.numel() for value in values]), strict=True):
            value.copy_(total.view_as(value))

    def _look(self, vector: Tensor, measuring: bool = False) -> None:
        told = torch.cat([vector[self._second : self._second + 1], vector[self._last : self.width]])
        if told.device.type == "cpu":
            self._check(told.tolist(), measuring)
            return
        event = torch.get_device_module(told.device).Event()
        self._unread.append((told.to("cpu", non_blocking=True), event, measuring))
        event.record()

    def _check(self, told: list[int], measuring: bool) -> None:
        second_load, last_load, closings, closing_count, number = [*told, 0, 0, 0][:5]
        size, measured = self.pool.size, second_load >> 48
        if last_load < 0:
            raise EquipoiseError(
                "attached routers must be called on every rank between two steps, and measuring() must end on every "
                "rank: on another rank one did not, and it raised. Its message says what and where."
            )
        if measured != (size if measuring else 0):
            raise EquipoiseError(
                f"every rank must measure when one does: {measured} of {size} ranks are at the end of measuring(), "
                "the others in a step. Enter measuring() on every rank of the group, also where a rank has no batch."
            )
        if 0 < closings < size:
            begins = size - closings
            raise EquipoiseError(
                "every rank must have the same number of micro-batches in a window when a loss pools over the window: "
                f"{closings} rank(s) closed it after {closing_count // closings} micro-batches, {begins} rank(s) began "
                f"micro-batch {number // begins}. Give all ranks equally many, or use pooling=previous."
            )
