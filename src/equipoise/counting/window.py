"""What was counted since the last optimizer step, in micro-batches, and the counts of the last closed window.

A window is what is counted between two calls of ``Balance.step``. It owns its micro-batches; each knows its calls.
``Exchange`` says what travels between the ranks.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from equipoise.counting.biases import Biases
from equipoise.counting.call import CountedCall
from equipoise.counting.exchange import Exchange
from equipoise.counting.layout import Layout, Statistics, outside_inference_mode
from equipoise.counting.loss_sums import Counts, LossSums
from equipoise.counting.pool import Pool
from equipoise.errors import EquipoiseError

WARN_AFTER_MICRO_BATCHES = 256  # hardly anybody accumulates as many: step() is forgotten

_log = logging.getLogger("equipoise")
_TOO_LATE = (
    "a backward must run before step() closes its window: it ran after. Call balance.step() after the optimizer's step."
)


class MicroBatch:
    """What was counted between two calls of ``Balance.loss``, on this rank.

    Calls are known by their number in the window. A call is *served* when its backward has got its gradient.
    """

    def __init__(self, layout: Layout, statistics: Statistics, device: torch.device, forward: object):
        self.layout = layout
        self.forward = forward  # the outermost one that was counted last
        self.num_forwards = 1
        self.vector = layout.zeros(device)
        self.statistics = statistics  # handed to the window when this closes
        self.sums: LossSums | None = None  # of its losses, if there are any
        self.counts: Counts | None = None  # that its losses go by, as far as they were known when it closed
        self.factor: Tensor | None = None  # that the caller gave the loss; known when its ticket's backward has run
        self.loss_scale: Tensor | float | None = None  # what the function loss_scale gave for this micro-batch
        self.had_backward = False  # its ticket's, or without a ticket that of a call
        self.holds_bias = False  # a call was replayed: no bias follows its window
        self._repeated: list[CountedCall] = []  # their forward had called the layer with the same tokens before
        self._calls: dict[int, list[int]] = {}  # by layer
        self._unserved: dict[int, list[int]] = {}
        self._choices: dict[int, Tensor] = {}  # expert ids of unserved calls

    @property
    def called_layers(self) -> set[int]:
        return set(self._calls)

    def num_tokens(self, layer: int) -> Int[Tensor, ""]:
        """The tokens of all calls: a layer that is called twice in a forward has twice its tokens."""
        return self.layout.num_tokens(self.vector, layer)

    def num_distinct_tokens(self, layer: int) -> Int[Tensor, ""]:
        num_tokens = self.num_tokens(layer)
        for call in self._repeated:
            if call.layer == layer:
                num_tokens = num_tokens - call.num_tokens
        return num_tokens

    def fewest_tokens(self) -> Int[Tensor, ""]:
        """Its unmasked tokens: the fewest of any called layer."""
        return torch.stack([self.num_distinct_tokens(layer) for layer in sorted(self.called_layers)]).min()

    def continue_in(self, forward: object) -> None:
        """Another forward begins, whose calls belong to this micro-batch too."""
        self.forward = forward
        self.num_forwards += 1

    def add_repeated(self, call: CountedCall) -> None:
        self._repeated.append(call)

    def has_several_calls(self, layer: int) -> bool:
        return len(self._calls[layer]) > 1

    def load(self, layer: int) -> Int[Tensor, " experts"]:
        return self.layout.load(self.vector, layer)

    def add_call(self, call: CountedCall, choice: Tensor | None) -> None:
        self._calls.setdefault(call.layer, []).append(call.number)
        self._unserved.setdefault(call.layer, []).append(call.number)
        if choice is not None:
            self._choices[call.number] = choice

    # ---- backward ----

    def begin_backward(self, factor: Tensor) -> None:
        """The backward of its ticket has run: those of its routers follow."""
        self.factor, self.had_backward = factor, True
        self._unserved = {layer: list(calls) for layer, calls in self._calls.items()}

    def is_unserved(self, call: CountedCall) -> bool:
        return call.number in self._unserved[call.layer]

    def mark_served(self, call: CountedCall, was_recomputed: bool) -> None:
        self.had_backward = True
        if self.is_unserved(call):
            self._unserved[call.layer].remove(call.number)
        if not was_recomputed:  # a recomputation may come again: for the gradient of the weights, after the inputs'
            self._choices.pop(call.number, None)

    def candidates(self, layer: int, also_served: bool) -> list[tuple[bool, int, Tensor | None]]:
        """The calls of ``layer`` that a recomputation may belong to: whether it is unserved, its number, its choice."""
        unserved = self._unserved.get(layer, [])
        calls = self._calls.get(layer, []) if also_served else unserved
        return [(call in unserved, call, self._choices.get(call)) for call in calls]

    def forget_calls(self) -> None:
        self._choices.clear()
        self._repeated.clear()
        if self.sums is not None:
            self.sums.forget_tokens()


def _num_equal(choices: list[Tensor | None], expert_ids: Tensor) -> list[int]:
    """How many ids of each choice are those; -1 for one of another shape. Waits for the device once."""
    fitting = [choice for choice in choices if choice is not None and choice.shape == expert_ids.shape]
    counts = iter(torch.stack([(choice == expert_ids).sum() for choice in fitting]).tolist() if fitting else [])
    return [-1 if choice is None or choice.shape != expert_ids.shape else next(counts) for choice in choices]


class ClosedWindow(NamedTuple):
    """What a window ended with, over all ranks."""

    vector: Int[Tensor, " numbers"]  # see Layout
    micro_batches: list[MicroBatch]  # of this rank; empty after a resume
    collectives: int = 0
    num_bytes: int = 0  # that this rank sent


class Window:
    """The open window, and the last closed one. ``pools_each``: a loss needs every micro-batch's pooled counts."""

    def __init__(self, layout: Layout, pool: Pool, has_losses: bool, pools_each: bool, biases: Biases):
        self.layout = layout
        self.exchange = Exchange(layout, pool, pools_each)
        self.num_closed = 0
        self.last: ClosedWindow | None = None
        self._has_losses = has_losses
        self._biases = biases
        self._number = -1  # of the open window, dropped ones included
        self._latest: MicroBatch | None = None  # that was closed
        self._has_warned = False  # of many micro-batches
        self._open()

    def _open(self) -> None:
        self._number += 1
        self.micro_batches: list[MicroBatch] = []
        self.current: MicroBatch | None = None  # the open one; None between two
        self.serving: MicroBatch | None = None  # whose ticket's backward ran last
        self._calls: list[CountedCall] = []
        self._statistics = Statistics(self._biases.gathered)  # of the closed micro-batches, on this rank
        self._sum_of_closed: Tensor | None = None  # sum of the closed micro-batches, over the ranks if pools_each
        self._pending: list[tuple[Any, Tensor]] = []
        self.exchange.reset()

    def restore(self, num_closed: int, vector: Tensor | None) -> None:
        """Continues after ``num_closed`` windows, the last of which had these counts."""
        self.num_closed = num_closed
        self.last = None if vector is None else ClosedWindow(vector, [])

    # ---- counting ----

    @property
    def is_first(self) -> bool:
        """Whether no window was open before this one."""
        return self._number == 0

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    @property
    def called_layers(self) -> set[int]:
        return set().union(*(micro_batch.called_layers for micro_batch in self.micro_batches))

    @property
    def holds_bias(self) -> bool:
        """Whether no bias is to follow this window."""
        return any(micro_batch.holds_bias for micro_batch in self.micro_batches)

    def num_tokens(self, device: torch.device) -> Int[Tensor, ""]:
        """The unmasked tokens of the open micro-batch, or of the last one."""
        micro_batch = self.current or self._latest
        if micro_batch is None:
            return torch.zeros((), dtype=torch.int64, device=device)
        return micro_batch.fewest_tokens()

    def micro_batch(self, device: torch.device, forward: object) -> MicroBatch:
        """The open micro-batch; begins one in ``forward`` if there is none."""
        if self.current is None:
            self.exchange.pool.check_no_rank_leaves()
            self.exchange.poll()
            with outside_inference_mode():
                self.current = MicroBatch(self.layout, Statistics(self._biases.gathered), device, forward)
                if self._has_losses:
                    self.current.sums = LossSums(self._biases.groups, self._biases.group_of)
            self.micro_batches.append(self.current)
            if len(self.micro_batches) == WARN_AFTER_MICRO_BATCHES and not self._has_warned:
                self._has_warned = True
                _log.warning(
                    f"{WARN_AFTER_MICRO_BATCHES} micro-batches were counted since the last step(). If the optimizer "
                    "made a step since then, call balance.step() after each one, or once balance.follow(optimizer). "
                    "Run a model that is not trained in eval() or inside balance.paused()."
                )
        return self.current

    def record(self, call: CountedCall, choice: Tensor | None) -> int:
        """Keeps a call, and its choice of experts. Returns its id, which its backward brings back."""
        self._calls.append(call)
        call.micro_batch.add_call(call, choice)
        return self._number << 32 | call.number

    def forward_failed(self, num_calls: int) -> None:
        """A forward raised: the micro-batch is dropped if it counted calls after the first ``num_calls``."""
        if self.current is not None and len(self._calls) > num_calls:
            self.micro_batches.remove(self.current)
            self.current = None

    # ---- backward ----

    def begin_backward(self, micro_batch: MicroBatch, factor: Tensor) -> None:
        """The backward of a ticket runs."""
        if micro_batch not in self.micro_batches:
            raise EquipoiseError(_TOO_LATE)
        micro_batch.begin_backward(factor)
        self.serving = micro_batch

    def call(self, call_id: int) -> CountedCall:
        if call_id >> 32 != self._number:
            raise EquipoiseError(_TOO_LATE)
        return self._calls[call_id & 0xFFFFFFFF]

    def recomputed_call(self, layer: int, expert_ids: Tensor, has_factor: bool) -> CountedCall | None:
        """The call that a backward makes again. The backward does not say of which micro-batch. None if there is none.

        It belongs to the one whose ticket's backward ran last. Without tickets (``has_factor``: the factor is known
        otherwise) to the one with the most similar choice. There a graph may run twice: for the gradient of its inputs,
        later for that of its weights. Raises ``EquipoiseError`` if the choice is not like that of any call.
        """
        micro_batches = self.micro_batches if self.serving is None and has_factor else [self.serving]
        candidates = [
            candidate
            for micro_batch in micro_batches
            if micro_batch is not None
            for candidate in micro_batch.candidates(layer, also_served=self.serving is None)
        ]
        if not candidates:
            return None
        choices = [choice for _, _, choice in candidates]
        # Of equally similar calls an unserved one is taken, then the later one: backwards run from the last call to the
        # first, but not every call has one.
        num_equal, _, number = max(
            (num_equal, is_unserved, number)
            for num_equal, (is_unserved, number, _) in zip(_num_equal(choices, expert_ids), candidates, strict=True)
        )
        if 2 * num_equal < expert_ids.numel():
            raise EquipoiseError(
                "a recomputed forward must choose the experts that it chose before: this one agrees with no call of "
                f"the window in more than {max(num_equal, 0)} of {expert_ids.numel()} choices. Checkpoint with "
                "preserve_rng_state=True, and run the backward before step()."
            )
        return self._calls[number]

    def unreached_layers(self) -> list[int]:
        """Layers whose loss had a backward that did not reach them, though their logits are differentiated.

        A compiled graph gives no such information.
        """
        calls = [call for call in self._calls if call.needs_gradient and call.micro_batch.had_backward]
        return sorted({call.layer for call in calls if call.micro_batch.is_unserved(call)})

    # ---- counts known so far ----

    def counts_so_far(self, micro_batch: MicroBatch) -> Counts:
        """The counts known so far: those of an open micro-batch and those that have arrived. Does not wait."""
        vector = micro_batch.vector[: self.exchange.width]
        pooled = vector if self._sum_of_closed is None else self._sum_of_closed + vector
        return Counts(micro_batch.vector, pooled, None if self.last is None else self.last.vector)

    def pooled_vector(self) -> Tensor:
        """The counts of all closed micro-batches, over all ranks. Waits for collectives that are under way."""
        with self._dropped_on_error():
            self._receive()
        assert self._sum_of_closed is not None
        return self._sum_of_closed

    # ---- closing ----

    def close_micro_batch(self) -> MicroBatch | None:
        """Ends the open micro-batch, and begins to pool it if a loss needs the pooled counts."""
        closed, self.current = self.current, None
        if closed is not None:
            self._latest = closed
            with outside_inference_mode():
                self._biases.add_micro_batch_statistics(closed.vector, closed.statistics)
                self._statistics.merge(closed.statistics)
                closed.statistics = Statistics(self._biases.gathered)
                if self._has_losses:
                    closed.counts = self.counts_so_far(closed)
                vector = closed.vector[: self.exchange.width]
                if self.exchange.pools_each:
                    vector = vector.clone()
                    self._pending.append((self.exchange.begin(vector, len(self.micro_batches)), vector))
                else:
                    self._add(vector)
        return closed

    def _add(self, vector: Tensor) -> None:
        # Never in place: the first vector belongs to a micro-batch.
        self._sum_of_closed = vector if self._sum_of_closed is None else self._sum_of_closed + vector

    def _receive(self) -> None:
        while self._pending:
            work, vector = self._pending.pop(0)
            self.exchange.receive(vector, work)
            self._add(vector)

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """If any rank fails, every rank drops this window."""
        try:
            yield
        except EquipoiseError:
            self._open()
            raise

    def close_empty(self) -> None:
        """Ends a window of a model without layers."""
        self.num_closed += 1

    def fail(self, device: torch.device, statistics: Statistics) -> None:
        """This rank cannot close the window. If others wait for it, they raise too, and all drop the window."""
        if self.exchange.pool.size > 1:
            self.exchange.fail(device, statistics.summed)
            self._open()

    def close(self, applied: bool | Tensor, absent: Statistics | None) -> tuple[Statistics, bool | Tensor]:
        """Ends the window over all ranks. Returns its statistics, and whether every rank's optimizer step was applied.

        One collective; if every micro-batch is pooled, one for the closing and one for statistics, if there are any.
        ``absent`` fills in for the statistics of layers that were not called here: every rank exchanges as many.
        """
        with self._dropped_on_error():
            self.close_micro_batch()
            if absent is not None:
                self._statistics.fill_in(absent)
            self._receive()
            assert self._sum_of_closed is not None
            vector, statistics = self._sum_of_closed, self._statistics
            if self.exchange.pool.size > 1:
                vector, applied = self.exchange.close(vector, statistics.summed, applied, len(self.micro_batches))
                statistics.gather(self.exchange.gather)
        for micro_batch in self.micro_batches:
            micro_batch.forget_calls()
        self.last = ClosedWindow(vector, self.micro_batches, self.exchange.collectives, self.exchange.num_bytes)
        self.num_closed += 1
        self._open()
        return statistics, applied
