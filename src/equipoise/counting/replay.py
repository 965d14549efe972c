"""Routing that was recorded elsewhere, used in place of a router's own choice; and the recording of routing.

A record is the choice of one forward: for each layer, k expert ids per token. While it is replayed, the tap of each
router has the ids, and ``BiasedTopK`` gives them in place of the top-k. ``Replays`` sees that each is used once, and
that what a backward computes again is replayed as well.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from equipoise._text import abbreviate, shape_or_type
from equipoise.counting.layout import outside_inference_mode
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer
from equipoise.routers.forward import ForwardContext, TokenMask
from equipoise.routers.tap import RouterCall
from equipoise.routers.tapped import tap_of
from equipoise.torch_internals import allow_compile_over_checkpoint

Record = Tensor | Mapping[str, Tensor | None] | Sequence[Tensor | None]

_TWICE = (
    "replay() must be entered once for each forward: {name} was called twice with one record, which is the choice of "
    "one forward. Enter replay() again with the ids of the second. A block that is computed in parts, or that calls "
    "its router several times, cannot be replayed: give its layer None, or compute it at once."
)
_OUTSIDE = (
    "the backward of a replayed forward must run inside its replay(): {name} is recomputed outside, where it would "
    "choose by itself. Call backward() in the same `with` block, or switch activation checkpointing off."
)
_NOT_REPLAYED = (
    "a backward inside replay() must be that of the forward inside: {name} is recomputed and was not called in this "
    "`with` block. Call the backward of an earlier forward before replay()."
)


class _Replay:
    """One record in use: which of its layers were called, and which a backward has computed again."""

    def __init__(self, ids: dict[int, Tensor], moves_bias: bool):
        self.ids, self.moves_bias = ids, moves_bias
        self.called: set[int] = set()
        self.has_backward: set[int] = set()
        self.recomputed: set[int] = set()


class Replays:
    """What is replayed and recorded in one attached model."""

    def __init__(self, layers: Sequence[MoELayer], context: ForwardContext):
        self.layers, self.context = layers, context
        self._active: _Replay | None = None  # the innermost
        self._recordings: list[Recording] = []
        self._replayed: set[int] = set()  # layers whose calls with gradients were replayed, in the open window
        self._unfinished: set[int] = set()  # of these, what was not computed again before its replay ended
        self._live: set[int] = set()  # layers that had a call with gradients that was not replayed, likewise

    @contextmanager
    def replaying(self, expert_ids: Record, mask: Tensor | None, moves_bias: bool) -> Iterator[None]:
        """Gives each router the ids of the record, until it is left."""
        token_mask = TokenMask(mask)
        token_mask.check()
        replay = _Replay(ids_by_layer(expert_ids, self.layers, mask), moves_bias)
        taps = [tap_of(layer.router) for layer in self.layers]
        before = [None if tap is None else tap.ids_to_replay for tap in taps]
        outer, context = self._active, self.context
        masks_before, num_calls_before = (context.token_mask, context.masks_by_layer), context.counter.num_calls
        # A graph holds our top-k mode. Without Dynamo there is none.
        end_compile = allow_compile_over_checkpoint(replay) if "torch._dynamo" in sys.modules else None
        try:
            if mask is not None:
                context.set_mask(token_mask)
            self._active = replay
            for layer, tap in enumerate(taps):
                if tap is not None:
                    tap.ids_to_replay = replay.ids.get(layer)
            yield
        finally:
            self._active = outer
            for tap, ids in zip(taps, before, strict=True):
                if tap is not None:
                    tap.ids_to_replay = ids
            self._unfinished |= replay.has_backward - replay.recomputed
            if mask is not None and context.counter.num_calls == num_calls_before:  # nothing was counted with it
                context.token_mask, context.masks_by_layer = masks_before
            if end_compile is not None:
                end_compile()

    @contextmanager
    def recording(self) -> Iterator["Recording"]:
        recording = Recording(self.layers)
        self._recordings.append(recording)
        reads_order, self.context.reads_order = self.context.reads_order, True
        try:
            yield recording
        finally:
            self._recordings = [other for other in self._recordings if other is not recording]
            self.context.reads_order = reads_order

    def holds_bias(self, layer: int) -> bool:
        """Whether a call of ``layer`` is replayed now, and no bias is to follow what it counts."""
        return self._active is not None and layer in self._active.ids and not self._active.moves_bias

    def window_closed(self) -> None:
        for layers in (self._replayed, self._unfinished, self._live):
            layers.clear()

    # ---- calls ----

    def observe(self, call: RouterCall, is_recomputation: bool) -> None:
        """A router was called. Raises ``EquipoiseError`` if it had the ids of another forward, or none."""
        layer, replay = call.layer, self._active
        is_replayed = replay is not None and layer in replay.ids
        if is_recomputation:
            self._check_recomputation(layer, is_replayed)
            return
        if replay is not None and is_replayed:
            if layer in replay.called:
                raise self._error(_TWICE, layer)
            replay.called.add(layer)
        if call.has_gradient and replay is not None and is_replayed:
            replay.has_backward.add(layer)
            self._replayed.add(layer)
        elif call.has_gradient:
            self._live.add(layer)
        for recording in self._recordings:
            recording.add(call)

    def _check_recomputation(self, layer: int, is_replayed: bool) -> None:
        if layer in self._unfinished:
            raise self._error(_OUTSIDE, layer)
        if is_replayed:
            assert self._active is not None
            if layer not in self._active.called:
                raise self._error(_NOT_REPLAYED, layer)
            self._active.recomputed.add(layer)
        elif layer in self._replayed and layer not in self._live:
            raise self._error(_OUTSIDE, layer)

    def _error(self, message: str, layer: int) -> EquipoiseError:
        return EquipoiseError(message.format(name=self.layers[layer].name))


# ---- records ----


def ids_by_layer(expert_ids: Record, layers: Sequence[MoELayer], mask: Tensor | None) -> dict[int, Tensor]:
    """The ids of a record by number of the layer, int64 ``[tokens, k]`` or ``[batch, sequence, k]``, where it computes.

    -1 for tokens that were not recorded, and for padding. Raises ``ValueError`` if they do not fit these layers. Values
    are checked where they are on the host.
    """
    by_layer = {}
    for number, (layer, ids) in enumerate(zip(layers, _split(expert_ids, layers), strict=True)):
        if ids is None:
            continue
        _check_shape(ids, layer)
        if layer.replay_obstacle is not None:
            raise EquipoiseError(
                f"a router must choose by one top-k to be replayed: {layer.name} cannot be, because "
                f"{layer.replay_obstacle}. Give it None in a list or a mapping: it is then routed live."
            )
        padding = _padding_of(ids, mask, layer)
        if ids.device.type == "cpu" and (padding is None or padding.device.type == "cpu"):
            ids = _without_padding(ids, padding)
            _check_values(ids, layer)
            padding = None
        with outside_inference_mode():
            ids = _without_padding(ids.to(layer.device, torch.int64), padding)
            by_layer[number] = ids.clone() if ids.is_inference() else ids
    return by_layer


def _split(expert_ids: Record, layers: Sequence[MoELayer]) -> list[Tensor | None]:
    """The part of each layer."""
    number, names = len(layers), [layer.name for layer in layers]
    if isinstance(expert_ids, Tensor):
        if expert_ids.dim() not in (3, 4) or expert_ids.shape[-2] != number:
            raise ValueError(
                f"expert_ids must be [batch, sequence, layers, k] or [tokens, layers, k] with the {number} layers of "
                f"balance.layers: got shape {tuple(expert_ids.shape)}. If dense layers have a place in it, select "
                "the others: expert_ids[..., moe_layers, :]."
            )
        return list(expert_ids.unbind(-2))
    if isinstance(expert_ids, Mapping):
        unknown, missing = sorted(expert_ids.keys() - {*names}), [name for name in names if name not in expert_ids]
        if unknown or missing:
            raise ValueError(
                f"expert_ids must name the layers of balance.layers: {abbreviate(unknown)} unknown, "
                f"{abbreviate(missing)} missing. Give None for a layer that is to be routed live."
            )
        return [expert_ids[name] for name in names]
    if not isinstance(expert_ids, list | tuple):
        raise ValueError(
            "expert_ids must be a tensor, a mapping from layer names to tensors, or a list of tensors by layer: got "
            f"{shape_or_type(expert_ids)}. Write torch.as_tensor(expert_ids) for an array."
        )
    if len(expert_ids) != number:
        raise ValueError(f"expert_ids must have a tensor for each of {number} layers: got a list of {len(expert_ids)}.")
    return list(expert_ids)


def _check_shape(ids: Tensor, layer: MoELayer) -> None:
    is_tensor = isinstance(ids, Tensor)
    if not is_tensor or ids.dim() not in (2, 3) or ids.shape[-1] != layer.k:
        raise ValueError(
            f"the ids of {layer.name} must be a tensor [tokens, {layer.k}] or [batch, sequence, {layer.k}]: got "
            f"{shape_or_type(ids)}."
        )
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"the ids of {layer.name} must be integers: got {ids.dtype}.")


def _padding_of(ids: Tensor, mask: Tensor | None, layer: MoELayer) -> Tensor | None:
    """Which of the tokens are padding, in the shape of the ids without k. None if the mask has other tokens."""
    if mask is None:
        return None
    if ids.dim() == 3 and mask.dim() == 2 and mask.shape[0] == ids.shape[0] and mask.shape[1] > ids.shape[1]:
        mask = mask[:, mask.shape[1] - ids.shape[1] :]  # as token_mask takes the end of each row
    if mask.numel() != ids.shape[:-1].numel():
        return None
    if ids.dim() == 2 and mask.dim() == 2 and layer.kind.adapter.is_sequence_first:
        mask = mask.T
    return mask.reshape(ids.shape[:-1]) == 0


def _without_padding(ids: Tensor, padding: Tensor | None) -> Tensor:
    """Padding is routed live: what a record has there may be no choice at all, such as k times expert 0."""
    if padding is None:
        return ids
    signed = ids if ids.dtype.is_signed else ids.long()
    return signed.masked_fill(padding.to(ids.device)[..., None], -1)


def _check_values(ids: Tensor, layer: MoELayer) -> None:
    ids = ids.long()
    is_recorded = (ids != -1).any(-1)
    recorded = ids[is_recorded]
    if ((recorded < 0) | (recorded >= layer.num_experts)).any():
        raise ValueError(
            f"the ids of {layer.name} must be from 0 to {layer.num_experts - 1}, or all -1 for a token that was not "
            f"recorded: got {int(recorded.min())} to {int(recorded.max())}."
        )
    ordered = recorded.sort(-1).values
    is_repeated = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if is_repeated.any():
        token = int(is_recorded.flatten().nonzero()[is_repeated.nonzero()[0, 0]])
        raise ValueError(
            f"the ids of {layer.name} must be {layer.k} different experts for each token: got "
            f"{ids.reshape(-1, layer.k)[token].tolist()} for token {token}, and {int(is_repeated.sum())} such tokens "
            "in all. Give -1 for a token that was not recorded, and a mask if there is padding."
        )


# ---- recording ----


class Recording(dict[str, list[Tensor]]):
    """The choices of each router call, in order, by layer name: ``[tokens, k]``, as the router orders them."""

    def __init__(self, layers: Sequence[MoELayer]):
        super().__init__({layer.name: [] for layer in layers})
        self._layers = layers
        self._grids: dict[str, list[tuple[int, int, bool]]] = {layer.name: [] for layer in layers}

    def add(self, call: RouterCall) -> None:
        """Adds a call. A copy: a compiled graph reuses its buffers."""
        layer = self._layers[call.layer]
        rows, length, leading = call.rows, call.length, call.leading
        is_sequence_first = layer.kind.adapter.is_sequence_first
        if is_sequence_first and len(leading) == 2:
            length, rows = leading
        elif leading == (length, rows) and rows != length:
            is_sequence_first = True
        with outside_inference_mode():
            self[layer.name].append(call.expert_ids.detach().clone())
        self._grids[layer.name].append((rows, length, is_sequence_first))

    def by_layer(self) -> list[Int[Tensor, "tokens k"]]:
        """A tensor for each layer, as Megatron's ``RouterReplay.get_recorded_data``: calls one after the other.

        Raises:
            ValueError: a layer was not called.
        """
        return [torch.cat(self._calls(layer.name)) for layer in self._layers]

    def by_token(self, rows: int | None = None) -> Int[Tensor, "batch sequence layers k"]:
        """One tensor, with the calls of a layer one after the other in the sequence: those of a generation.

        A row of it, ``[sequence, layers, k]``, is what vLLM gives for a request as ``routed_experts``.

        Args:
            rows: of the batch; None: as the forwards showed it.

        Raises:
            ValueError: a layer was not called, the rows are not known, or layers differ in their k or their tokens.
        """
        layers = [self._on_grid(layer.name, rows) for layer in self._layers]
        if len({ids.shape for ids in layers}) != 1:
            shapes = abbreviate(sorted({str(tuple(ids.shape)) for ids in layers}))
            raise ValueError(f"all layers must have the same k and the same tokens: got {shapes}. Take by_layer().")
        return torch.stack(layers, 2)

    def _calls(self, name: str) -> list[Tensor]:
        if not self[name]:
            raise ValueError(f"every layer must be called while routing is recorded: {name} was not.")
        return self[name]

    def _on_grid(self, name: str, rows: int | None) -> Tensor:
        parts = []
        for ids, (num_rows, length, is_sequence_first) in zip(self._calls(name), self._grids[name], strict=True):
            num_rows = rows or (num_rows if num_rows * length == len(ids) else 0)
            if num_rows < 1 or len(ids) % num_rows:
                raise ValueError(
                    f"rows must divide the {len(ids)} tokens of a call of {name}: got rows={rows}. "
                    "Give by_token(rows=...), the rows of the batch, or take by_layer()."
                )
            shape = (-1, num_rows) if is_sequence_first else (num_rows, -1)
            grid = ids.reshape(*shape, ids.shape[-1])
            parts.append(grid.transpose(0, 1) if is_sequence_first else grid)
        if len({part.shape[0] for part in parts}) > 1:
            raise ValueError(f"every call of {name} must have as many rows: got {[len(part) for part in parts]}.")
        return torch.cat(parts, 1)
