"""Counts each router call once.

A call counts if the router is in training mode, gradients are on (but for reentrant checkpointing), counting is not
paused, and no backward is running: inside a backward a forward is a recomputation. While an evaluation is measured,
calls count in any mode, apart from the window.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.balancers import Balancer
from equipoise.counting.biases import Biases
from equipoise.counting.gradient import Losses
from equipoise.counting.layout import Layout, check_no_capture
from equipoise.counting.masks import Tokens
from equipoise.counting.pool import Pool
from equipoise.counting.replay import Replays
from equipoise.counting.window import CountedCall, MicroBatch, Window
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer
from equipoise.routers.forward import ForwardContext, ForwardTokens
from equipoise.routers.tap import RECOMPUTED, UNCOUNTED, RouterCall
from equipoise.torch_internals import is_backward_running, is_shape_inference

# Why calls that look like training were not counted.
IN_EVALUATION = "in evaluation mode"
WITHOUT_GRADIENT = "without gradients"


class Mode(Enum):
    """What is done with router calls."""

    COUNTING = "calls in training mode, with gradients, are counted into the window"
    COUNTING_ALL = "calls in training mode are counted, without gradients too"
    MEASURING = "calls are counted, apart from the window"
    PAUSED = "no call is counted"


class _Undecided(NamedTuple):
    """A call that is to be counted. With fewer tokens than its forward it is a tile of it, or has others."""

    call: RouterCall
    counted: CountedCall | None  # None: it is measured
    forward: ForwardTokens


class Recorder:
    """What the taps of one attached model report to. Owns the mode, and the counts of an evaluation."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[MoELayer],
        balancers: Sequence[Balancer],
        pool: Pool,
        start: dict[str, Tensor],
        fused: bool = False,
    ):
        self.layers = layers
        self.layout = Layout([layer.num_experts for layer in layers], [layer.k for layer in layers])
        self.biases = Biases(layers, balancers, start, self.layout, fused)
        losses = [balancer for balancer in balancers if balancer.has_loss]
        pools_each = any(b.scope == "global_batch" and b.pooling == "window" for b in losses)
        self.window = Window(self.layout, pool, bool(losses), pools_each, self.biases)
        self.losses = Losses(layers, self.biases, self.window)
        self._needs_sequences = any(b.has_loss and b.scope == "sequence" for b in balancers)
        adapters = [layer.kind.adapter for layer in layers]
        self.context = ForwardContext(model, self, self._needs_sequences, adapters)
        self.tokens = Tokens(model, layers, self.context)
        self.replays = Replays(layers, self.context)
        self.uncounted: set[str] = set()  # since the last step: why calls that look like training were not counted
        self.detached_layers: set[int] = set()  # whose logits carry no gradient to a router that is trained
        self._undecided: dict[int, list[_Undecided]] = {}  # by layer: calls with a part of their forward's tokens
        self._device_of_model = next(model.parameters(), torch.zeros(())).device
        self._mode = Mode.COUNTING
        self._is_measuring = False
        self._measured: Tensor | None = None  # counts of the evaluation that is measured
        self._is_shape_inference = False  # of the last forward; see is_shape_inference

    @property
    def device(self) -> torch.device:
        """The device of counts if no call determines it."""
        if not self.layers:
            return self._device_of_model
        return self.layers[0].device

    # ---- modes ----

    def paused(self) -> AbstractContextManager[None]:
        return self._in_mode(Mode.PAUSED)

    @contextmanager
    def counting_all(self) -> Iterator[None]:
        before, self._mode = self._mode, Mode.COUNTING_ALL
        try:
            yield
        finally:
            self._mode = before

    @contextmanager
    def _in_mode(self, mode: Mode) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            with self.context.set_aside():
                yield
        finally:
            self._mode = before

    @contextmanager
    def measuring(self, device: torch.device, load: dict[str, Tensor]) -> Iterator[None]:
        """Counts an evaluation. Fills ``load`` at its end, by layer, summed over the ranks."""
        if self._is_measuring:
            raise EquipoiseError("measuring() must not be nested: it is open already. Leave the inner one out.")
        self._is_measuring = True
        try:
            try:
                with self._in_mode(Mode.MEASURING):
                    yield
            except Exception:
                with suppress(RuntimeError):  # the other ranks may be gone
                    self.window.exchange.fail(device, self.biases.empty_statistics().summed)
                raise
            vector = self.layout.zeros(device) if self._measured is None else self._measured
            self.window.exchange.measure(vector, self.biases.empty_statistics().summed)
            load.update(self.by_name(vector))
        finally:
            self._is_measuring, self._measured = False, None

    # ---- what taps report to ----

    def observe(self, call: RouterCall) -> int:
        is_recomputation = is_backward_running()
        if not is_recomputation:
            self._is_shape_inference = is_shape_inference()
        if not self._is_shape_inference:
            self.replays.observe(call, is_recomputation)
        if self._is_shape_inference or self._mode is Mode.PAUSED:
            return UNCOUNTED
        if is_recomputation:
            if not call.is_training or self._mode is Mode.MEASURING:
                return UNCOUNTED
            self._check_recomputation(call.layer)
            return RECOMPUTED
        if self._mode is Mode.MEASURING:
            self._check_sizes(call, check_k=False)
            self._measure(call)
            return UNCOUNTED
        if not call.is_training:
            if call.has_gradient:
                self.uncounted.add(IN_EVALUATION)
            return UNCOUNTED
        if not call.has_gradient and self._mode is not Mode.COUNTING_ALL:
            self.uncounted.add(WITHOUT_GRADIENT)
            return UNCOUNTED
        self._check_sizes(call, check_k=True)
        return self._count(call)

    def gradient(self, call: RouterCall, call_id: int) -> Float[Tensor, "tokens experts"]:
        return self.losses.gradient(call, call_id)

    def add_score_gradient(
        self, call: RouterCall, call_id: int, onto: Float[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        return self.losses.add_score_gradient(call, call_id, onto)

    def note_detached_logits(self, layer: int) -> None:
        self.detached_layers.add(layer)

    def restore_bias(self, layer: int) -> None:
        self.biases.restore(layer)

    def adopt_bias(self, layer: int) -> None:
        self.biases.adopt(layer)

    # ---- forwards ----

    @property
    def num_calls(self) -> int:
        return self.window.num_calls

    def forward_is_a_micro_batch(self) -> bool:
        has_tickets = self.losses.num_losses and self.losses.loss_scale is None
        return not (has_tickets or self.losses.separates)

    def forward_failed(self, num_calls: int) -> None:
        self._undecided.clear()
        self.window.forward_failed(num_calls)

    def forward_ended(self) -> None:
        forward = self.context.innermost
        self.settle(forward)
        forward.end()

    @torch.no_grad()
    def settle(self, forward: ForwardTokens | None = None) -> None:
        """Counts the calls that waited for further tiles of their forward, which did not come: as other tokens."""
        for layer, calls in list(self._undecided.items()):
            if forward is None or calls[0].forward is forward:
                del self._undecided[layer]
                for undecided in calls:
                    self._fit(undecided)

    # ---- counting ----

    def _measure(self, call: RouterCall) -> None:
        forward = ForwardTokens() if self._is_outside(call) else self.context.innermost
        before = forward.add(call.layer, call.num_tokens)
        self._place(_Undecided(self.tokens.on_grid(call), None, forward), before)

    def _count(self, call: RouterCall) -> int:
        window, context, layer = self.window, self.context, call.layer
        outermost, is_outside = context.outermost, self._is_outside(call)
        current = window.current
        if (current is not None and current.forward is not outermost) or is_outside:
            self._begin_forward(current, layer, outermost)
        micro_batch = window.micro_batch(call.expert_ids.device, outermost)
        micro_batch.holds_bias |= self.replays.holds_bias(layer)
        if window.num_calls == 0:  # statistics depend on the biases: adopt what was written into slots since
            for group in self.biases.groups:
                if group.has_statistics:
                    self.biases.adopt_writes(group)
        num_tokens = call.num_tokens
        needs_gradient = num_tokens > 0 and call.logits.requires_grad
        counted = CountedCall(window.num_calls, layer, micro_batch, num_tokens, needs_gradient)
        call_id = window.record(counted, self._choice(call))
        forward = ForwardTokens() if is_outside else context.innermost
        before = forward.add(layer, num_tokens)
        if call.mask is None and call.sequence_ids is None and not (self._needs_sequences or context.masks_by_layer):
            self._add(call, counted)
        else:
            call = self.tokens.on_grid(call)
            self._place(_Undecided(call, counted, forward), before)
        if before:
            rows, length = self.tokens.grid(call)
            if before >= rows * length:
                micro_batch.add_repeated(counted)
        return call_id

    def _choice(self, call: RouterCall) -> Tensor | None:
        """What a recomputation of the call will be known by. A copy: a compiled graph reuses its buffers."""
        if not self.losses.num_losses or call.keeps_scores:
            return None
        return call.expert_ids.to(torch.int16)

    def _begin_forward(self, current: MicroBatch | None, layer: int, outermost: ForwardTokens) -> None:
        """Where no ticket separates micro-batches, each forward of the model is one.

        Outside a forward, where a router is called by itself, one begins when its layer comes again.
        """
        if current is None:
            return
        is_new = current.forward is not outermost
        if self.forward_is_a_micro_batch() and (is_new or layer in current.called_layers):
            self.window.close_micro_batch()
        elif is_new:
            current.continue_in(outermost)

    def _is_outside(self, call: RouterCall) -> bool:
        """Whether a router is called by itself, not by a forward of the model."""
        return not (self.context.is_under_way or call.is_compiled)

    def _place(self, undecided: _Undecided, before: int) -> None:
        """Finds the tokens of a call, and counts it.

        A call with fewer tokens than its forward waits. If later calls of the layer complete the number, all were parts
        in order (tiles). If the forward ends first, they were other tokens.
        """
        call = undecided.call
        is_followed = self.context.is_under_way and not call.is_compiled  # a graph reuses the memory of a call
        if not (is_followed and self.context.uses_places and self.tokens.may_be_tile(call)):
            self._fit(undecided)
            return
        rows, length = self.tokens.grid(call)
        reached = before % (rows * length) + call.num_tokens
        waiting = self._undecided.setdefault(call.layer, [])
        waiting.append(undecided)
        if reached == rows * length:
            del self._undecided[call.layer]
            start = 0
            for tile in waiting:
                self._fit(tile, start, is_tile=True)
                start += tile.call.num_tokens
        elif reached > rows * length:
            self.settle(undecided.forward)

    def _fit(self, undecided: _Undecided, before: int = 0, is_tile: bool = False) -> None:
        """Counts a call with the mask and the sequences of its tokens."""
        call, counted, forward = undecided
        if call.is_compiled:  # its graph may have the context of another forward
            forward = ForwardTokens()
        mask, sequences = self.tokens.fit(call, forward, before, is_tile)
        if counted is None:
            if self._measured is None:
                self._measured = self.layout.zeros(call.expert_ids.device)
            self.layout.count(self._measured, call.layer, call.expert_ids, mask)
            return
        if is_tile and self._needs_sequences:
            self.tokens.check_whole_sequences(call, before)
        counted.mask = mask
        if self._needs_sequences:
            if sequences is None:
                sequences = self.tokens.rows_as_sequences(call, forward, before, is_tile)
            counted.sequences = sequences
        self._add(call, counted)

    def _add(self, call: RouterCall, counted: CountedCall) -> None:
        """Adds a call, its statistics and its losses to its micro-batch."""
        layer, micro_batch, expert_ids = call.layer, counted.micro_batch, call.expert_ids
        group, row = self.biases.group_of[layer]
        if counted.sequences is not None and group.takes_kernels(expert_ids):
            check_no_capture(expert_ids.device)
            load = self.layout.load(micro_batch.vector, layer)
            counted.sequence_load = counted.count_by_kernel(expert_ids, len(load), load)
        else:
            self.layout.count(micro_batch.vector, layer, expert_ids, counted.mask)
        if self.losses.num_losses or group.has_statistics:
            routing = self.losses.routing(counted, call)
            for number, balancer in enumerate(group.balancers):
                statistic = balancer.statistic(routing, row)
                if statistic is not None:
                    micro_batch.statistics.add(layer, number, statistic)
            if self.losses.num_losses:
                self.losses.add(counted, routing)

    # ---- checks ----

    def _check_sizes(self, call: RouterCall, check_k: bool) -> None:
        """A router must route as it did when it was attached. An evaluation may choose another k."""
        layer, num_experts = self.layers[call.layer], call.logits.shape[-1]
        k = call.expert_ids.shape[-1] if check_k else layer.k
        if (num_experts, k) != (layer.num_experts, layer.k):
            raise EquipoiseError(
                f"a router must route as it did when it was attached: {layer.name} chose {layer.k} of "
                f"{layer.num_experts} experts then, and {k} of {num_experts} now. Call detach() before a model is "
                "changed, and attach it again after."
            )

    def _check_recomputation(self, layer: int) -> None:
        """Raises if a recomputed layer has no call in this window: its forward belongs to an earlier one."""
        window, group = self.window, self.biases.group_of[layer][0]
        if group.steering is not None and not window.is_first and layer not in window.called_layers:
            raise EquipoiseError(
                f"a backward must run before step() closes its window: {self.layers[layer].name} is recomputed after "
                "it, with another bias than its forward had. Call balance.step() after the optimizer's step. If a "
                "forward runs inside paused() or measuring(), run its backward inside as well."
            )

    # ---- windows ----

    def close_window(self, applied: bool | Tensor, called_layers: set[int]) -> None:
        """Closes the window over all ranks and moves the biases, if every rank's optimizer step was applied."""
        window, num_before = self.window, self.window.num_closed
        try:
            self.settle()
        except EquipoiseError:
            window.fail(self.device, self.biases.empty_statistics())
            raise
        absent = self.biases.empty_statistics() if len(called_layers) < len(self.layers) else None
        # A choice that was replayed is not the router's own, so its load says nothing of the bias.
        statistics, applied = window.close(False if window.holds_bias else applied, absent)
        self.uncounted.clear()
        self.replays.window_closed()
        if self.context.has_explicit_mask:
            self.context.clear()
        if applied is not False and window.last is not None:
            self.biases.update(window.last.vector, statistics, num_before, applied)

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """The loads in a vector of counts, by layer name. Views."""
        loads = vector[self.layout.loads].split(self.layout.num_experts)
        return {layer.name: load for layer, load in zip(self.layers, loads, strict=True)}
