"""What ``Balance.step`` warns of, once for each layer."""

import logging
from collections.abc import Iterable

from equipoise._text import abbreviate
from equipoise.counting.recorder import Recorder

__all__ = ["Notices"]

_log = logging.getLogger("equipoise")


class Notices:
    """Warns of layers that look wrong in the open window. Remembers what it has said."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._said: set[tuple[str, int]] = set()

    def give(self, called_layers: set[int]) -> None:
        recorder = self._recorder
        if len(called_layers) < len(recorder.layers):
            self._not_called(layer for layer in range(len(recorder.layers)) if layer not in called_layers)
        if recorder.losses.number:
            self._unreached(recorder.window.unreached_layers())
        if recorder.unmatched_masks:
            self._unmatched_masks(sorted(recorder.unmatched_masks))

    def _new(self, kind: str, layers: Iterable[int]) -> tuple[list[int], str]:
        """Those not said yet, and their names."""
        new = [layer for layer in layers if (kind, layer) not in self._said]
        self._said.update((kind, layer) for layer in new)
        return new, abbreviate(self._recorder.layers[layer].name for layer in new)

    def _not_called(self, layers: Iterable[int]) -> None:
        new, names = self._new("not called", layers)
        if new:
            _log.warning(
                f"step: {names} got no token between two steps, in training mode on this rank. This is right if a "
                "layer serves a kind of text or images that is not in every batch. Leave a layer that is never called "
                "out with attach(where=...)."
            )

    def _unreached(self, layers: Iterable[int]) -> None:
        new, names = self._new("unreached", layers)
        if new:
            _log.warning(
                f"step: the balancing loss gave {names} no gradient: the routing weights were part of no loss "
                "that was differentiated. This is right if a branch ends early or is detached. Otherwise the block "
                "computes its own weights. It must multiply the outputs of experts by the weights of the router."
            )

    def _unmatched_masks(self, layers: Iterable[int]) -> None:
        new, names = self._new("unmatched mask", layers)
        if new:
            shape, num_tokens = self._recorder.unmatched_masks[new[0]]
            _log.warning(
                f"step: {names} routes {num_tokens} tokens, and the attention_mask has the shape {shape}: it belongs "
                "to other tokens. All tokens of the layer were counted. Say which are padding with "
                "balance.token_mask(mask, where=...). Of a longer mask the end is taken, as for multi-token "
                "prediction."
            )
