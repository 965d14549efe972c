"""What ``Balance.step`` warns of, once for each layer."""

import logging
from collections.abc import Iterable

from equipoise._text import abbreviate
from equipoise.counting.recorder import IN_EVALUATION, WITHOUT_GRADIENT, Recorder

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
_DETACHED = (
    "step: the balancing loss gives {names} no gradient: the logits that the router returns are detached from its "
    "weights. Return the logits of which the scores are made, without detach() or no_grad()."
)
_OTHER_TOKENS = (
    "step: {names} routes {num_tokens} tokens, and the attention_mask or the sequences of the forward have the shape "
    "{shape}: they belong to other tokens. All tokens of the layer were counted. Say which are padding with "
    "balance.token_mask(mask, sequence_ids, where=...)."
)
SEVERAL_FORWARDS = (
    "loss() covers {num_forwards} forwards. This is right if the loss is made from all of them, as from a pair of a "
    "chosen and a rejected answer. If the loss of an earlier forward was never made, because of an error in between, "
    "its tokens count all the same: step(applied=False) drops what was counted since the last step."
)
_UNCOUNTED = {
    WITHOUT_GRADIENT: (
        "a forward in training mode began with gradients off, and was not counted. This is right for generation, for "
        "the log-probabilities of a reference or an older model, and for a forward that is run again with gradients. "
        "If its tokens count, run it in `with balance.counting():`."
    ),
    IN_EVALUATION: (
        "nothing was counted: the routers were called in evaluation mode, with gradients on. Call model.train() before "
        "training."
    ),
}


class Notices:
    """Warns of layers that look wrong in the open window. Remembers what it has said."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._said: set[tuple[str, int]] = set()

    def give(self, called_layers: set[int]) -> None:
        recorder = self._recorder
        if len(called_layers) < len(recorder.layers):
            self._warn(_NOT_CALLED, (layer for layer in range(len(recorder.layers)) if layer not in called_layers))
        if recorder.losses.num_losses:
            self._warn(_UNREACHED, recorder.window.unreached_layers())
            self._warn(_DETACHED, sorted(recorder.detached_layers))
        self._warn(_OTHER_TOKENS, sorted(recorder.tokens.other_tokens))
        if WITHOUT_GRADIENT in recorder.uncounted:
            self.say_uncounted(WITHOUT_GRADIENT)

    def say_uncounted(self, reason: str) -> None:
        """Why calls that look like training were not counted."""
        self._say(_UNCOUNTED[reason])

    def check_forwards(self, num_forwards: int) -> None:
        """A micro-batch was closed by ``loss()``."""
        if num_forwards > 1:
            self._say(SEVERAL_FORWARDS, num_forwards=num_forwards)

    def _say(self, message: str, **values: int) -> None:
        if (message, -1) not in self._said:
            self._said.add((message, -1))
            _log.warning(message.format(**values))

    def _warn(self, message: str, layers: Iterable[int]) -> None:
        new = [layer for layer in layers if (message, layer) not in self._said]
        if new:
            self._said.update((message, layer) for layer in new)
            names = abbreviate(self._recorder.layers[layer].name for layer in new)
            shape, num_tokens = self._recorder.tokens.other_tokens.get(new[0], ((), 0))
            _log.warning(message.format(names=names, shape=shape, num_tokens=num_tokens))
