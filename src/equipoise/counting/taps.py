"""Puts the taps of one attached model in, and takes them out."""

from equipoise.counting.recorder import Recorder
from equipoise.routers.kind import ADDED_SLOT
from equipoise.routers.tap import Tap, tap_router, untap_router
from equipoise.torch_internals import allow_compile_over_checkpoint


class Taps:
    """All that ``attach`` adds to the modules of a model: a tap in each router, hooks around forwards."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._hooks = recorder.context.listen({layer.router for layer in recorder.layers})
        self._taps = [self._tap(index) for index in range(len(recorder.layers))]
        uses_mode = any(tap.uses_topk_mode for tap in self._taps)
        self._end_compile_over_checkpoint = allow_compile_over_checkpoint(recorder) if uses_mode else None
        self.are_removed = False

    def _tap(self, index: int) -> Tap:
        recorder, biases = self._recorder, self._recorder.biases
        layer, (group, row) = recorder.layers[index], biases.group_of[index]
        tap = Tap(layer.kind, layer.k, index, recorder, recorder.context, has_loss=bool(group.losses))
        added_slot = None
        if group.slots[row].name == ADDED_SLOT and group.steering is not None and group.biases is not None:
            added_slot = group.biases[row].clone()
            tap.multiplies = group.steering.multiplies
        tap_router(layer, tap, added_slot)
        biases.restore(index)
        return tap

    def remove(self) -> None:
        """Leaves the model as it was. A model's own slot keeps what it holds."""
        for hook in self._hooks:
            hook.remove()
        for layer, tap in zip(self._recorder.layers, self._taps, strict=True):
            tap.observer = None
            untap_router(layer.router, layer.slot)
        self._hooks, self._taps = [], []
        if self._end_compile_over_checkpoint is not None:
            self._end_compile_over_checkpoint()
        self.are_removed = True
