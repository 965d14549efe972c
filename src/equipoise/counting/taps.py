"""Puts the taps of one attached model in, and takes them out."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.counting.recorder import Recorder
from equipoise.model_loss import warn_of_model_loss, warn_of_router_losses
from equipoise.routers.adapter import RouterAdapter
from equipoise.routers.blocks import BlockAdapter
from equipoise.routers.kind import ADDED_SLOT
from equipoise.routers.tap import Tap
from equipoise.routers.tapped import is_tapped, tap_router, untap_router
from equipoise.torch_internals import allow_compile_over_checkpoint


class Taps:
    """All that ``attach`` adds to the modules of a model: a tap in each router, hooks around forwards."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._routers = [layer.router for layer in recorder.layers]
        self._hooks = recorder.context.listen(set(self._routers))
        if any(group.balancers for group in recorder.biases.groups):
            self._hooks += warn_of_model_loss(recorder.context.model)
            self._hooks += _watch_router_losses(recorder)
        self._taps = [self._tap(index) for index in range(len(recorder.layers))]
        steers = any(group.steering is not None for group in recorder.biases.groups)
        stops = [layer.own_balancing.stop for layer in recorder.layers] if steers else []
        self._resume_own_updates = [stop() for stop in stops if stop is not None]  # of biases, by the framework
        uses_mode = any(
            ADDED_SLOT in layer.router._buffers or isinstance(layer.kind.gives, BlockAdapter)
            for layer in recorder.layers
        )
        self._end_compile_over_checkpoint = allow_compile_over_checkpoint(recorder) if uses_mode else None
        self.are_removed = False

    def _tap(self, index: int) -> Tap:
        recorder, biases = self._recorder, self._recorder.biases
        layer, (group, row) = recorder.layers[index], biases.group_of[index]
        has_slopes = bool(group.losses) and all(balancer.has_slopes for balancer in group.losses)
        tap = Tap(layer.kind, layer.k, index, recorder, recorder.context, bool(group.losses), has_slopes)
        tap.reads_scores = bool(group.losses) or group.has_statistics
        added_slot = None
        if group.slots[row].name == ADDED_SLOT and group.steering is not None and group.biases is not None:
            added_slot = group.biases[row].clone()
            tap.multiplies = group.steering.multiplies
        tap_router(layer, tap, added_slot)
        biases.restore(index)
        return tap

    def lost_layers(self) -> list[str]:
        """Names of the layers whose router got another class since: it neither reports its calls nor is steered."""
        lost = {router_class for router_class in set(map(type, self._routers)) if not is_tapped(router_class)}
        return [layer.name for layer in self._recorder.layers if type(layer.router) in lost] if lost else []

    def remove(self) -> None:
        """Removes what was added, and nothing that others put there since. A model's own slot keeps what it holds."""
        for hook in self._hooks:
            hook.remove()
        for layer, tap in zip(self._recorder.layers, self._taps, strict=True):
            tap.observer = tap.router = None
            untap_router(layer.router, layer.slot)
        for resume in self._resume_own_updates:
            resume()
        self._hooks, self._taps, self._resume_own_updates = [], [], []
        if self._end_compile_over_checkpoint is not None:
            self._end_compile_over_checkpoint()
        self.are_removed = True


def _watch_router_losses(recorder: Recorder) -> list[RemovableHandle]:
    """Watches what the routers return, if their adapter says that a loss is in it."""
    by_framework: dict[str, dict[nn.Module, Callable[[Any], Tensor | None]]] = {}
    for layer in recorder.layers:
        adapter = layer.kind.adapter
        if type(adapter).own_loss is not RouterAdapter.own_loss:
            by_framework.setdefault(adapter.framework, {})[layer.router] = adapter.own_loss
    return [hook for name, own_loss in by_framework.items() for hook in warn_of_router_losses(own_loss, name)]
