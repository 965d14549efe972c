"""Finds out which tokens of a forward a router call has, and fits masks and sequence ids to them.

Masks and sequence ids lie on a grid, the rows of the batch by their length. Most calls have all tokens of the grid.
Others have

- the tokens in another order: inside a sequence-first model;
- the end of each row: a layer that predicts more than the next token;
- a part: a block that is computed in tiles calls its router once for each. Only at the end of the forward is it known
  that the calls were tiles;
- other tokens, such as the patches of images, to which the mask of the forward does not apply.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.counting.call import FittedMask, Sequences
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer
from equipoise.routers.arguments import PREDICTS_FURTHER
from equipoise.routers.forward import ForwardContext, ForwardTokens
from equipoise.routers.tap import RouterCall
from equipoise.torch_internals import PICKED

_JOINS_EMBEDDINGS = "eh_proj"  # in DeepSeek's models: joins hidden states with the embeddings of later tokens


class Place(NamedTuple):
    """Which tokens of a grid a router call has, and in which order."""

    columns: slice = slice(None)  # of every row
    is_sequence_first: bool = False
    tokens: slice = slice(None)  # of the flattened columns

    @property
    def key(self) -> tuple[Any, ...]:
        columns, tokens = self.columns, self.tokens
        return columns.start, columns.stop, self.is_sequence_first, tokens.start, tokens.stop

    def of(self, values: Tensor, device: torch.device | None = None) -> Tensor:
        """Their values, flat, of ``values`` on the grid."""
        values = (values if device is None else values.to(device))[:, self.columns]
        return (values.T if self.is_sequence_first else values).reshape(-1)[self.tokens]


class Tokens:
    """The tokens of the router calls of one attached model."""

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer], context: ForwardContext):
        self.layers = layers
        self.context = context
        # By layer that the mask or the sequences of its forward do not fit: their shape, the number of tokens.
        self.other_tokens: dict[int, tuple[tuple[int, ...], int]] = {}
        self._sequence_first = {n for n, layer in enumerate(layers) if layer.kind.adapter.is_sequence_first}
        self._has_columns: dict[int, bool] = {}  # by layer with tiles: whether they are parts of all rows
        further = layers_predicting_further(model, {layer.router for layer in layers})
        self._predicts_further = {index for index, layer in enumerate(layers) if layer.router in further}

    # ---- what is known of a call ----

    def on_grid(self, call: RouterCall) -> RouterCall:
        """The call with the mask that ``token_mask(where=...)`` gave its layer, if any; masks in two dimensions."""
        explicit = self.context.masks_by_layer.get(call.layer)
        if explicit is not None:
            call = call._replace(mask=explicit.mask, sequence_ids=explicit.sequence_ids)
        if len(call.leading) == 2 and self.layers[call.layer].kind.adapter.is_sequence_first:
            # Its own input shows them; the forward of a later pipeline stage, or with split sequences, does not.
            call = call._replace(rows=call.leading[1], length=call.leading[0])
        if call.mask is None and call.sequence_ids is None:
            return call
        mask, ids = (self._on_grid(values, call) for values in (call.mask, call.sequence_ids))
        return call._replace(mask=mask, sequence_ids=ids)

    def _on_grid(self, values: Tensor | None, call: RouterCall) -> Tensor | None:
        if values is None:
            return None
        if values.dim() == 1:
            is_of_forward = values.numel() == call.rows * call.length
            return values.view(call.rows, call.length) if is_of_forward else values[None]
        rows, length = values.shape
        if not self.is_explicit(call.layer) or call.num_tokens >= values.numel() or call.num_tokens % rows:
            return values
        # It covers a cached prefix too. The forward shows its length, unless the router is called by itself.
        is_cut = call.num_tokens == rows * call.length if call.rows == rows else not call.length
        return values[:, length - call.num_tokens // rows :] if is_cut else values

    def is_explicit(self, layer: int) -> bool:
        return self.context.token_mask is not None or layer in self.context.masks_by_layer

    def grid(self, call: RouterCall) -> tuple[int, int]:
        """Rows and length of the tokens that the call is of; zeros if they are not known."""
        values = call.sequence_ids if call.mask is None else call.mask
        return (call.rows, call.length) if values is None else (values.shape[0], values.shape[1])

    def may_be_tile(self, call: RouterCall) -> bool:
        """Whether it has fewer tokens than its forward, and may be followed by calls that have the others."""
        rows, length = self.grid(call)
        is_picked = call.leading == PICKED
        return 0 < call.num_tokens < rows * length and not is_picked and self._end(call) is None

    def _end(self, call: RouterCall) -> Place | None:
        """The end of each row, for a layer that predicts further than the next token."""
        rows, length = self.grid(call)
        if call.layer not in self._predicts_further or call.num_tokens % rows or not call.num_tokens < rows * length:
            return None
        return Place(slice(length - call.num_tokens // rows, None))

    # ---- fitting ----

    def fit(
        self, call: RouterCall, forward: ForwardTokens, before: int = 0, is_tile: bool = False
    ) -> tuple[FittedMask | None, Sequences | None]:
        """The mask and the sequences of a call's own tokens. None: all count; the forward does not show sequences.

        ``is_tile`` says that it has the tokens of its forward that follow the first ``before``.
        """
        if self.context.inputs.problem is not None and not self.is_explicit(call.layer):
            raise EquipoiseError(self.context.inputs.problem)
        if call.num_tokens == 0 or (call.mask is None and call.sequence_ids is None):
            return None, None
        mask, ids = call.mask, call.sequence_ids
        mask_place, ids_place = (self._place(values, call, before, is_tile) for values in (mask, ids))
        for name, values, place in (("the mask", mask, mask_place), ("sequence_ids", ids, ids_place)):
            if values is not None and place is None:
                self._note_other_tokens(name, values, call)
        fitted, sequences, device = None, None, call.expert_ids.device
        if mask is not None and mask_place is not None:
            fitted = forward.share(mask, (*mask_place.key, device), lambda: FittedMask(mask_place.of(mask, device)))
        if ids is not None and ids_place is not None:
            how = ("sequences", *ids_place.key, device)
            sequences = forward.share(ids, how, lambda: _numbered_sequences(ids, ids_place, device))
        return fitted, sequences

    def _note_other_tokens(self, name: str, values: Tensor, call: RouterCall) -> None:
        shape = tuple(values.shape)
        if self.is_explicit(call.layer):
            raise EquipoiseError(
                f"{name} must hold one number per token that {self._name(call)} routes: got shape {shape} for "
                f"{call.num_tokens} tokens. Say it for these tokens with balance.token_mask(mask, sequence_ids), or "
                "with where=... for this layer."
            )
        self.other_tokens.setdefault(call.layer, (shape, call.num_tokens))

    def _place(self, values: Tensor | None, call: RouterCall, before: int, is_tile: bool) -> Place | None:
        """Where the call's tokens are among ``values``; None if it has others."""
        return None if values is None else self._place_on(tuple(values.shape), call, before, is_tile)

    def _place_on(self, shape: tuple[int, ...], call: RouterCall, before: int, is_tile: bool) -> Place | None:
        rows, length = shape
        num_values = rows * length
        leading, layer = call.leading, call.layer
        if leading == (length, rows) and rows != length:
            self._sequence_first.add(layer)
        is_sequence_first = layer in self._sequence_first
        if call.num_tokens == num_values:
            self._check_order(shape, call)
            return Place(is_sequence_first=is_sequence_first)
        if is_tile:
            return self._tile(shape, call, before, is_sequence_first)
        return self._end(call) if call.num_tokens < num_values else None

    def _tile(self, shape: tuple[int, ...], call: RouterCall, before: int, is_sequence_first: bool) -> Place:
        (rows, length), num_tokens = shape, call.num_tokens
        if len(call.leading) == 2:
            self._has_columns[call.layer] = call.leading[0] == rows
        is_columns = self._has_columns.get(call.layer, False)
        is_known = call.layer in self._has_columns or is_sequence_first or rows == 1 or num_tokens % rows
        if not is_known:
            raise EquipoiseError(
                f"a router that is called for parts of a forward must show which tokens each part has: "
                f"{self._name(call)} got {num_tokens} of {rows * length} tokens, flattened. Call it with hidden "
                "states [batch, part of the sequence, dim], or once with all tokens."
            )
        if is_columns and before % rows == 0:
            return Place(slice(before // rows, (before + num_tokens) // rows))
        return Place(slice(None), is_sequence_first, slice(before, before + num_tokens))

    def _check_order(self, shape: tuple[int, ...], call: RouterCall) -> None:
        rows, length = shape
        if self.context.token_mask is not None and 1 < call.rows == length != rows > 1:
            raise EquipoiseError(
                f"the mask must have a row for each of the {call.rows} rows of the batch: got shape "
                f"{shape}, which has them as columns. Pass mask.T."
            )

    def _name(self, call: RouterCall) -> str:
        return self.layers[call.layer].name

    # ---- sequences ----

    def check_whole_sequences(self, call: RouterCall, before: int) -> None:
        """Raises if a tile cuts a row: the loss of a sequence needs all its tokens at once."""
        length = self.grid(call)[1]
        in_rows = not call.leading or call.leading[-1] == length
        if not in_rows or before % length or call.num_tokens % length:
            raise EquipoiseError(
                "a loss of scope sequence must have each sequence in one call of a router: "
                f"{self._name(call)} is called for parts of the rows, {call.num_tokens} tokens at a time. Take scope "
                "micro_batch or global_batch, or compute the block for all tokens at once."
            )

    def rows_as_sequences(
        self, call: RouterCall, forward: ForwardTokens, before: int, is_tile: bool
    ) -> Sequences | None:
        """The sequences of a call if every row is one. None: unknown."""
        rows, length, num_tokens, device = call.rows, call.length, call.num_tokens, call.expert_ids.device
        if num_tokens == 0:
            return Sequences(torch.zeros(0, dtype=torch.int64, device=device), 0)
        if length and (is_tile or num_tokens == rows * length):
            place = self._place_on((rows, length), call, before, is_tile)
            if place is None:
                return None
            is_whole = place == Place()
        else:
            rows = rows or (call.leading[0] if len(call.leading) == 2 else 0)
            if rows <= 0 or num_tokens % rows:
                return None
            place, length, is_whole = Place(), num_tokens // rows, True

        def make() -> Sequences:
            ids = place.of(torch.arange(rows, device=device)[:, None].expand(rows, length))
            return Sequences(ids, rows, length if is_whole else 0)

        return forward.share(None, (*place.key, rows, length, device), make)


def _numbered_sequences(ids: Tensor, place: Place, device: torch.device) -> Sequences:
    of_tokens = place.of(ids, device).clone()  # a copy: a compiled graph reuses its memory
    is_bound = device.type != "cpu"
    return Sequences(of_tokens, ids.numel() if is_bound else int(of_tokens.max()) + 1, is_bound=is_bound)


def layers_predicting_further(model: nn.Module, routers: set[nn.Module]) -> set[nn.Module]:
    """The modules of multi-token prediction, which see rows without their first tokens. Known by their names.

    A class with all ``routers`` inside is that of the model itself, whatever it is called.
    """
    further: set[nn.Module] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        has_name = path != "" and PREDICTS_FURTHER.search(path.rpartition(".")[-1])
        has_class = PREDICTS_FURTHER.search(type(module).__name__) or _JOINS_EMBEDDINGS in module._modules
        if has_name or (has_class and not routers <= {*module.modules()}):
            further.update(module.modules())
    return further
