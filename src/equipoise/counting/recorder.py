"""Counts each router call once.

A call counts if the router is in training mode, counting is not paused, and no backward is running: inside a backward a
forward is a recomputation. While an evaluation is measured, calls count in any mode, apart from the window.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.balancers import Balancer
from equipoise.counting.biases import Biases
from equipoise.counting.gradient import Losses
from equipoise.counting.layout import Layout
from equipoise.counting.masks import fit_mask, is_mask_of, number_sequences
from equipoise.counting.pool import Pool
from equipoise.counting.window import CountedCall, MicroBatch, Window
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer
from equipoise.routers.forward import ForwardContext
from equipoise.routers.tap import RECOMPUTED, UNCOUNTED, RouterCall
from equipoise.torch_internals import is_backward_running, is_shape_inference


class Mode(Enum):
    """What is done with router calls."""

    COUNTING = "calls in training mode are counted into the window"
    MEASURING = "calls are counted, apart from the window"
    PAUSED = "no call is counted"


class Recorder:
    """What the taps of one attached model report to. Owns the mode, and the counts of an evaluation."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[MoELayer],
        balancers: Sequence[Balancer],
        pool: Pool,
        start: dict[str, Tensor],
    ):
        self.layers = layers
        self.layout = Layout([layer.num_experts for layer in layers])
        self.biases = Biases(layers, balancers, start, self.layout)
        num_losses = sum(balancer.has_loss for balancer in balancers)
        pools_each = any(b.has_loss and b.scope == "global_batch" and b.pooling == "window" for b in balancers)
        self.window = Window(self.layout, pool, num_losses, pools_each, self.biases)
        self.losses = Losses(layers, self.biases, self.window)
        self.context = ForwardContext(model, self.window)
        # By layer that the attention_mask does not fit: the shape of the mask, the number of tokens.
        self.unmatched_masks: dict[int, tuple[tuple[int, ...], int]] = {}
        self._device_of_model = next(model.parameters(), torch.zeros(())).device
        self._needs_sequences = any(b.has_loss and b.scope == "sequence" for b in balancers)
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
                    self.window.exchange.fail(device)
                raise
            vector = self.layout.zeros(device) if self._measured is None else self._measured
            self.window.exchange.measure(vector)
            load.update(self.by_name(vector))
        finally:
            self._is_measuring, self._measured = False, None

    # ---- what taps report to ----

    def observe(self, call: RouterCall) -> int:
        is_recomputation = is_backward_running()
        if not is_recomputation:
            self._is_shape_inference = is_shape_inference()
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
            return UNCOUNTED
        self._check_sizes(call, check_k=True)
        return self._count(call)

    def gradient(self, call: RouterCall, call_id: int) -> Float[Tensor, "tokens experts"]:
        return self.losses.gradient(call, call_id)

    def restore_bias(self, layer: int) -> None:
        self.biases.restore(layer)

    def adopt_bias(self, layer: int) -> None:
        self.biases.adopt(layer)

    # ---- counting ----

    def _measure(self, call: RouterCall) -> None:
        call = self._with_fitted_mask(call)
        if self._measured is None:
            self._measured = self.layout.zeros(call.expert_ids.device)
        self.layout.count(self._measured, call.layer, call.expert_ids, call.mask)

    def _count(self, call: RouterCall) -> int:
        call = self._with_fitted_mask(call)
        layer, expert_ids, window = call.layer, call.expert_ids, self.window
        if self.losses.number == 0 or self.losses.loss_scale is not None:
            self._split_by_forward(layer)
        micro_batch = window.micro_batch(expert_ids.device)
        if window.num_calls == 0:  # statistics depend on the biases: adopt what was written into slots since
            for group in self.biases.groups:
                if group.has_statistics:
                    self.biases.adopt_writes(group)
        self.layout.count(micro_batch.vector, layer, expert_ids, call.mask)
        counted = self._counted_call(call, micro_batch)
        group, row = self.biases.group_of[layer]
        if self.losses.number or group.has_statistics:
            routing = self.losses.routing(counted, call.logits, expert_ids, call.weights)
            for number, balancer in enumerate(group.balancers):
                statistic = balancer.statistic(routing, row)
                if statistic is not None:
                    micro_batch.statistics.add(layer, number, statistic)
            self.losses.add(counted, routing)
        return window.record(counted, expert_ids)

    def _counted_call(self, call: RouterCall, micro_batch: MicroBatch) -> CountedCall:
        num_tokens, device = call.expert_ids.shape[0], call.expert_ids.device
        sequence_ids, num_sequences = None, 0
        if self._needs_sequences:
            sequence_ids, num_sequences = number_sequences(call.sequence_ids, call.rows, num_tokens, device)
        num_unmasked = num_tokens if call.mask is None else call.mask.sum()
        needs_gradient = num_tokens > 0 and call.logits.requires_grad
        number = self.window.num_calls
        return CountedCall(
            number, call.layer, micro_batch, call.mask, sequence_ids, num_sequences, num_unmasked, needs_gradient
        )

    def _split_by_forward(self, layer: int) -> None:
        """If no ticket separates micro-batches, one begins when the layer that came first comes again."""
        micro_batch = self.window.current
        if micro_batch is not None and not self.losses.separates and layer == micro_batch.first_layer:
            self.window.close_micro_batch()

    def _with_fitted_mask(self, call: RouterCall) -> RouterCall:
        """The call with the mask of its own tokens."""
        mask, context, layer = call.mask, self.context, call.layer
        num_tokens = call.expert_ids.shape[0]
        explicit = context.masks_by_layer.get(layer)
        if mask is None and explicit is None:
            return call
        if explicit is not None:
            mask = explicit.mask
            two_dimensional = [len(tensor) for tensor in explicit if tensor is not None and tensor.dim() == 2]
            rows = two_dimensional[0] if two_dimensional else call.rows
            call = call._replace(sequence_ids=explicit.sequence_ids, rows=rows)
        elif mask is not None and not context.is_explicit:
            self._check_padding()
            if not is_mask_of(mask, num_tokens):
                self.unmatched_masks.setdefault(layer, (tuple(mask.shape), num_tokens))
                mask = None
        mask = fit_mask(mask, num_tokens, call.rows, self.layers[layer].name, call.expert_ids.device)
        return call._replace(mask=mask)

    # ---- checks ----

    def _check_padding(self) -> None:
        if self.context.not_padding is not None:
            raise EquipoiseError(
                "an attention_mask of two dimensions must say which tokens are padding: of the one that the model was "
                f"called with, {self.context.not_padding}. Say which tokens count before the forward: "
                "balance.token_mask(mask), token_mask(None) if all do, token_mask(mask, where=...) for some layers."
            )

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
        absent = self.biases.empty_statistics() if len(called_layers) < len(self.layers) else None
        statistics, applied = window.close(applied, absent)
        if self.context.has_explicit_mask:
            self.context.clear()
        if applied is not False and window.last is not None:
            self.biases.update(window.last.vector, statistics, num_before, applied)

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """The loads in a vector of counts, by layer name. Views."""
        return {layer.name: self.layout.load(vector, index) for index, layer in enumerate(self.layers)}
