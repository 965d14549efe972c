"""One window's collectives: counts, with status flags in their spare high bits.

If the window is pooled once, the loads travel with the statistics of balancers. If every micro-batch is pooled, three
numbers go with them and say which collective this rank is in: so every rank notices when one closes the window while
another begins a micro-batch. For the other flags a rank adds one large number to a count, which is never below 0 nor
near 2^48. After the sum the high bits say how many ranks have set the flag, and the low bits are the counts:

    first count    + 2^48 for a rank whose optimizer skipped its step
    second count   + 2^48 for a rank at the end of ``measuring()``, and not in a window
    last count     - 2^62 / ranks for a rank that cannot go on

On a CPU the flags are checked when they arrive. From a GPU they are copied without a wait, and checked when the next
micro-batch begins, if they are there by then, or before the next collective begins. So the host waits for nothing, and
no rank begins a collective that the others will not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.counting.layout import Layout
from equipoise.counting.pool import Pool
from equipoise.errors import EquipoiseError

FLAG = 2**48


class Exchange:
    """The collectives of one attached model, in the order in which every rank begins them."""

    def __init__(self, layout: Layout, pool: Pool, pools_each: bool):
        self.layout, self.pool = layout, pool
        if pool.size > 1 and layout.loads.stop == 1:
            raise EquipoiseError(
                "a model on several ranks must have two experts or more, since the flags of the ranks travel in their "
                "counts: got a single expert. It needs no balancing; leave it as it is."
            )
        self.pools_each = pools_each and pool.size > 1  # every micro-batch, because a loss waits for it
        self.width = layout.header.stop if self.pools_each else layout.loads.stop  # how many numbers travel
        self._second, self._last = 1, layout.loads.stop - 1
        self._unread: list[tuple[Tensor, Any, bool]] = []  # flags on their way from a GPU
        self._is_broken = False
        self.reset()

    def reset(self) -> None:
        self.collectives, self.num_bytes = 0, 0  # of this window, sent by this rank; without those of ``measure``

    def begin(self, counts: Tensor, number: int) -> Any:
        """Begins to sum the counts of the window's ``number``-th micro-batch over the ranks, in place."""
        counts[self.layout.header.stop - 1] = number
        return self._all_reduce(counts)

    def receive(self, counts: Tensor, work: Any) -> None:
        """Waits for the counts of a micro-batch, and checks the flags in them."""
        work.wait()
        self._check_flags(counts)

    def close(
        self, counts: Tensor, statistics: Sequence[Tensor], applied: bool | Tensor, num_micro_batches: int
    ) -> tuple[Tensor, bool | Tensor]:
        """Ends a window. Returns its counts over the ranks, and whether all applied its step. Sums the statistics.

        A window that is pooled once sends counts and statistics together. Where every micro-batch is pooled, the counts
        are there already: first a vector without counts says that this rank closes, then the statistics follow.
        """
        closing = torch.zeros_like(counts) if self.pools_each else counts.clone()
        if isinstance(applied, Tensor):
            closing[0] += (~applied.to(closing.device).bool()).long() * FLAG
        elif not applied:
            closing[0] += FLAG
        if self.pools_each:  # another rank may begin a micro-batch, so this must have the size of one
            header = self.layout.header
            closing[header.start], closing[header.start + 1] = 1, num_micro_batches
            self._all_reduce(closing).wait()
        else:
            self._sum([closing, *statistics])
        self._check_flags(closing)
        if self.pools_each and statistics:
            self._sum(statistics, reads=False)  # the flags of the closing are still on their way
        skips = closing[0] >> 48
        if closing.device.type == "cpu":
            applied = not int(skips)
        else:  # flags that nobody has read yet must move nothing
            good = (closing[self._last] >= 0) & (closing[self._second] < FLAG)
            if self.pools_each:
                good &= closing[self.layout.header.start] == self.pool.size
            applied = (skips == 0) & good
        closing[0] &= FLAG - 1
        return counts if self.pools_each else closing, applied

    def measure(self, counts: Tensor, statistics: Sequence[Tensor] = ()) -> None:
        """Sums what an evaluation counted, in place.

        ``statistics`` are those of a window without tokens: if another rank is in a step, the sizes must be equal.
        """
        if self.pool.size == 1 or not self.layout.num_layers:
            return
        vector = counts[: self.width]
        vector[self._second] += FLAG
        before = self.collectives, self.num_bytes
        self._sum([vector, *([] if self.pools_each else statistics)])
        self.collectives, self.num_bytes = before
        self._check_flags(vector, measuring=True)
        self.read()  # the result of a measurement is read now anyway
        vector[self._second] &= FLAG - 1

    def fail(self, device: torch.device, statistics: Sequence[Tensor] = ()) -> None:
        """This rank cannot go on. The others wait for it; this makes them raise too.

        ``statistics`` are those of a window without tokens: the collective must have the size that the others expect.
        """
        if self.pool.size > 1 and self.layout.num_layers:
            vector = self.layout.zeros(device)[: self.width]
            vector[self._last] = -(2**62 // self.pool.size)
            self._sum([vector, *([] if self.pools_each else statistics)])
            self._is_broken = device.type != "cpu"

    def gather(self, value: Any) -> list[Any]:
        """The Python value of every rank, in rank order."""
        self.read()
        before = self.pool.collectives
        by_rank = self.pool.gather(value)
        self.collectives += self.pool.collectives - before
        return by_rank

    def read(self) -> None:
        """Waits for flags that are on their way from a GPU, and raises if they report a failure.

        After a failure on a GPU nothing goes on. The rank that failed knows it one collective before the others, and
        these have closed a window that it has not.
        """
        if self._is_broken:
            raise EquipoiseError(
                "balancing must begin anew after an error on a GPU: the ranks learn of it in different windows, so "
                "their counts would no longer fit together. Restart from a checkpoint."
            )
        unread, self._unread = self._unread, []
        for flags, event, measuring in unread:
            event.synchronize()
            try:
                self._raise_on_failure(flags.tolist(), measuring)
            except EquipoiseError:
                self._is_broken = True
                raise

    def poll(self) -> None:
        """Raises if flags that have arrived report a failure. Does not wait."""
        if self._unread and self._unread[0][1].query():
            self.read()

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
        joined = torch.cat([value.reshape(-1) for value in values])
        self._all_reduce(joined, reads).wait()
        for value, total in zip(values, joined.split([value.numel() for value in values]), strict=True):
            value.copy_(total.view_as(value))

    def _check_flags(self, vector: Tensor, measuring: bool = False) -> None:
        flags = torch.cat([vector[self._second : self._second + 1], vector[self._last : self.width]])
        if flags.device.type == "cpu":
            self._raise_on_failure(flags.tolist(), measuring)
            return
        event = torch.get_device_module(flags.device).Event()
        self._unread.append((flags.to("cpu", non_blocking=True), event, measuring))
        event.record()

    def _raise_on_failure(self, flags: list[int], measuring: bool) -> None:
        second_load, last_load, closings, closing_count, number = [*flags, 0, 0, 0][:5]
        size, num_measuring = self.pool.size, second_load >> 48
        if last_load < 0:
            raise EquipoiseError(
                "attached routers must be called on every rank between two steps, and measuring() must end on every "
                "rank: another rank failed to, and raised an error. Its message says where."
            )
        if num_measuring != (size if measuring else 0):
            raise EquipoiseError(
                f"every rank must measure when one does: {num_measuring} of {size} ranks are at the end of "
                "measuring(), the others in a step. Enter measuring() on every rank of the group, also where a rank "
                "has no batch."
            )
        if 0 < closings < size:
            begins = size - closings
            raise EquipoiseError(
                "every rank must have the same number of micro-batches in a window when a loss pools over the window: "
                f"{closings} rank(s) closed it after {closing_count // closings} micro-batches, {begins} rank(s) began "
                f"micro-batch {number // begins}. Give all ranks equally many, or use pooling=previous."
            )
