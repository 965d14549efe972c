"""What ``Balance.step`` warns of, once for each layer."""

import logging
from collections.abc import Iterable

from equipoise._text import abbreviate
from equipoise.counting.recorder import Recorder

_log = logging.getLogger("equipoise")


_NOT_CALLED = (
    "step: {names} got no token between two steps, in training mode on this rank. This is right if a layer serves a "
    "kind of text or images that is not in every batch. Leave a layer that is never called out with attach(where=...)."
)
_UNREACHED = (
    "step: the balancing loss gave {names} no gradient: the routing weights were part of no loss that was "
    "differentiated. This is right if a branch ends early or is detached. Otherwise the block computes its own "
    "weights: let it multiply the outputs of experts by the weights of the router, or at least add 0 * weights.sum() "
    "to its output, through which the gradient comes."
)
_UNMATCHED_MASK = (
    "step: {names} routes {num_tokens} tokens, and the attention_mask has the shape {shape}: it belongs to other "
    "tokens. All tokens of the layer were counted. Say which are padding with balance.token_mask(mask, where=...). Of "
    "a longer mask the end is taken, as for multi-token prediction."
)


class Notices:
    """Warns of layers that look wrong in the open window. Remembers what it has said."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._said: set[tuple[str, int]] = set()

    def give(self, called_layers: set[int]) -> None:
        recorder = self._recorder
        if len(called_layers) < len(recorder.layers):
            self._warn(_NOT_CALLED, (layer for layer in range(len(recorder.layers)) if layer not in called_layers))
        if recorder.losses.number:
            self._warn(_UNREACHED, recorder.window.unreached_layers())
        self._warn(_UNMATCHED_MASK, sorted(recorder.unmatched_masks))

    def _warn(self, message: str, layers: Iterable[int]) -> None:
        new = [layer for layer in layers if (message, layer) not in self._said]
        if new:
            self._said.update((message, layer) for layer in new)
            names = abbreviate(self._recorder.layers[layer].name for layer in new)
            shape, num_tokens = self._recorder.unmatched_masks.get(new[0], ((), 0))
            _log.warning(message.format(names=names, shape=shape, num_tokens=num_tokens))
