"""Ties the routers of a model to balancers: counts, pools over ranks, steps, saves."""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise import metrics
from equipoise.balancers import Balancer, Layers, format_strategy, parse_strategy
from equipoise.errors import EquipoiseError
from equipoise.routing import Routing, score
from equipoise.taps.families import find_routers, num_experts_of, prove
from equipoise.taps.tap import (
    OWN_SLOT,
    RECOMPUTED,
    UNCOUNTED,
    ForwardContext,
    Hook,
    RouterKind,
    Tap,
    is_tapped,
    tap_router,
    untap_router,
)
from equipoise.window import Call, Layout, MicroBatch, Pool, Window

__all__ = ["Balance", "attach"]

_log = logging.getLogger("equipoise")


class _Layer(NamedTuple):
    name: str
    router: nn.Module
    kind: RouterKind
    num_experts: int
    k: int


class _Ticket(torch.autograd.Function):
    """A scalar whose backward tells the micro-batch which factor its loss was given."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, window: Window, micro_batch: MicroBatch) -> Tensor:
        ctx.window, ctx.micro_batch = window, micro_batch
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.micro_batch.serve(grad)
        ctx.window.serving = ctx.micro_batch
        return None, None, None, None


class _Group:
    """The layers with the same number of experts, k and gate, and the balancers prepared for them, states stacked."""

    def __init__(self, layers: list[int], balancers: list[Balancer]):
        self.layers = layers
        self.balancers = balancers
        self.losses = [balancer for balancer in balancers if balancer.has_loss]
        self.steering = next((balancer for balancer in balancers if balancer.has_offset), None)


class Balance:
    """The balancing of one model; made by ``attach``.

    In a training loop, per micro-batch ``loss = model(...).loss + balance.loss()``; per optimizer step, after it,
    ``balance.step()``. See ``attach``.

    Attributes:
        load: by layer, the counts of the last closed window over all ranks, int64 ``[experts]``.
        offsets: by layer, what is added to the scores for the choice, float32 ``[experts]``.
        num_tokens: unmasked tokens of the open micro-batch on this rank, or of the last one (int64 scalar).
        loss_scale: the factor of the losses where no ticket can be added (a pipeline stage, ``torch.autograd.grad``).
    """

    def __init__(
        self, model: nn.Module, layers: list[_Layer], balancers: Sequence[Balancer], pool: Pool, offsets: dict[str, Tensor]
    ):
        self.loss_scale: float | Tensor | None = None
        self._model = model
        self._layers = layers
        self._strategy = format_strategy(balancers)
        self._layout = Layout([layer.num_experts for layer in layers])
        self._pool = pool
        self._num_losses = sum(balancer.has_loss for balancer in balancers)
        self._needs_sequences = any(balancer.has_loss and balancer.scope == "sequence" for balancer in balancers)
        pools_each = any(b.has_loss and b.scope == "global_batch" and b.pooling == "window" for b in balancers)
        self._window = Window(self._layout, pool, self._num_losses, pools_each)
        self._num_windows = 0
        self._last: Tensor | None = None  # pooled counts of the last closed window
        self._last_micro_batches: list[MicroBatch] = []
        self._last_micro_batch: MicroBatch | None = None
        self._calls_loss = False
        self._paused = False
        self._measured: Tensor | None = None
        self._measuring = False
        self._groups, self._group_of = self._make_groups(balancers, offsets)
        self._tap(model)

    def _make_groups(
        self, balancers: Sequence[Balancer], offsets: dict[str, Tensor]
    ) -> tuple[list[_Group], list[tuple[_Group, int]]]:
        members: dict[Any, list[int]] = {}
        for index, layer in enumerate(self._layers):
            members.setdefault((layer.num_experts, layer.k, layer.kind.gate), []).append(index)
        groups, group_of = [], [None] * len(self._layers)
        for (_, k, gate), indices in members.items():
            prepared = [deepcopy(balancer) for balancer in balancers]
            start = torch.stack([offsets[self._layers[index].name] for index in indices])
            for balancer in prepared:
                balancer.prepare(Layers(gate, k, start))
            group = _Group(indices, prepared)
            groups.append(group)
            for row, index in enumerate(indices):
                group_of[index] = (group, row)
        return groups, group_of

    def _tap(self, model: nn.Module) -> None:
        names = list(_signature(model.forward))
        self._context = ForwardContext(names)
        self._hooks = [
            model.register_forward_pre_hook(Hook(self._context.before), with_kwargs=True),
            model.register_forward_hook(Hook(self._context.after)),
        ]
        self._taps = []
        for index, layer in enumerate(self._layers):
            group, row = self._group_of[index]
            tap = Tap(self, self._context, index, layer.kind, has_loss=bool(group.losses))
            own = None
            if group.steering is not None and layer.kind.slot is None:
                own = group.steering.offset()[row].clone()
                _allow_compile_over_checkpoint()
            tap_router(layer.router, tap, own)
            self._taps.append(tap)
            self.restore_offset(index)

    # ---- what the taps call ----

    def observe(
        self,
        layer: int,
        weights: Float[Tensor, "tokens k"],
        logits: Float[Tensor, "tokens experts"],
        expert_ids: Int[Tensor, "tokens k"],
        mask: Tensor | None,
        sequence_ids: Tensor | None,
        rows: int,
        training: bool,
    ) -> int:
        recomputing = torch._C._current_graph_task_id() != -1  # the one place that asks: a backward is running
        if recomputing:
            return RECOMPUTED if training and not self._measuring and not self._paused else UNCOUNTED
        if not self._measuring and (self._paused or not training):
            return UNCOUNTED
        num_tokens = expert_ids.shape[0]
        mask = _fit(mask, num_tokens, self._layers[layer].name)
        if self._measuring:
            if self._measured is None:
                self._measured = self._layout.zeros(expert_ids.device)
            self._layout.count(self._measured, layer, expert_ids, mask)
            return UNCOUNTED
        window = self._window
        if self._num_losses == 0 or self.loss_scale is not None:
            self._split_by_forward(layer)
        micro_batch = window.micro_batch(expert_ids.device)
        self._layout.count(micro_batch.vector, layer, expert_ids, mask)
        segments, num_sequences = None, 0
        if self._needs_sequences:
            segments, num_sequences = _segments(sequence_ids, rows, num_tokens, expert_ids.device)
        call = Call(layer, micro_batch, mask, segments, num_sequences, num_tokens if mask is None else mask.sum())
        if self._num_losses:
            routing = self._routing(layer, call, logits, expert_ids, weights)
            for index, balancer in enumerate(self._group_of[layer][0].losses):
                value = balancer.loss(routing, self._scope_load(balancer, layer, micro_batch, window.load_now))
                micro_batch.losses[index, layer].add_(value * call.num_tokens)
        return window.record(call)

    def _split_by_forward(self, layer: int) -> None:
        """Where no ticket separates micro-batches, one begins when the layer that came first comes again."""
        micro_batch = self._window.current
        if micro_batch is not None and not self._calls_loss and layer == micro_batch.first_layer:
            self._window.close_micro_batch()

    def gradient(
        self,
        layer: int,
        token: int,
        logits: Float[Tensor, "tokens experts"],
        expert_ids: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens experts"]:
        if token == UNCOUNTED:
            return torch.zeros_like(logits)
        call, factor = self._serve(layer, token)
        micro_batch = call.micro_batch
        if micro_batch is self._window.current:  # no loss() closed it: loss_scale stands in
            self._window.close_micro_batch()
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            routing = self._routing(layer, call, logits, expert_ids, weights)
            total = torch.zeros((), dtype=routing.scores.dtype, device=logits.device)
            for balancer in self._group_of[layer][0].losses:
                pooled = None
                if balancer.scope == "global_batch" and balancer.pooling == "window":
                    pooled = self._window.load_pooled()
                load = self._scope_load(balancer, layer, micro_batch, pooled)
                total = total + balancer.coefficient * balancer.loss(routing, load)
            if len(micro_batch.calls[layer]) > 1:  # the loss is a mean over all tokens of the micro-batch
                tokens = micro_batch.vector[self._layout.tokens][layer].clamp_min(1)
                total = total * (call.num_tokens / tokens).to(total.dtype)
            (gradient,) = torch.autograd.grad(total, logits, grad_outputs=torch.ones_like(total) * factor)
        return gradient

    def _serve(self, layer: int, token: int) -> tuple[Call, Tensor | float]:
        """The counted call that this backward belongs to, and the factor of its loss."""
        window = self._window
        number, call = -1, None
        if token == RECOMPUTED:  # a recomputed call does not know its micro-batch: the ticket that ran last says it
            micro_batch = window.serving
            if micro_batch is None and self.loss_scale is not None:
                micro_batch = next((m for m in window.micro_batches if m.unserved[layer]), None)
            if micro_batch is not None and micro_batch.unserved[layer]:
                number = micro_batch.unserved[layer][-1]  # backwards run from the last call to the first
                call = window.calls[number]
        else:
            number, call = window.call(token)
        factor = self.loss_scale
        if call is not None and call.micro_batch.factor is not None:
            factor = call.micro_batch.factor
            if number not in call.micro_batch.unserved[layer]:
                factor = None  # served already: this backward has no ticket of its own
        if call is None or factor is None:
            raise EquipoiseError(
                "balance.loss() must be added to the loss of every micro-batch, between its forward and its backward: "
                f"the backward of {self._layers[layer].name} found none. Write `loss = model(...).loss + "
                "balance.loss()`; where that cannot be done, set balance.loss_scale to the factor of the loss."
            )
        if number in call.micro_batch.unserved[layer]:
            call.micro_batch.unserved[layer].remove(number)
        return call, factor

    def _routing(self, layer: int, call: Call, logits: Tensor, expert_ids: Tensor, weights: Tensor) -> Routing:
        scores = score(logits, self._layers[layer].kind.gate)
        return Routing(logits, scores, expert_ids, weights, call.mask, call.sequence_ids, call.num_sequences)

    def _scope_load(
        self, balancer: Balancer, layer: int, micro_batch: MicroBatch, pooled: Tensor | None
    ) -> Int[Tensor, " experts"] | None:
        if balancer.scope == "sequence":
            return None
        if balancer.scope == "micro_batch":
            return self._layout.load(micro_batch.vector, layer)
        if balancer.pooling == "window":
            return self._layout.load(pooled, layer)
        if self._last is None:  # before the first window ends: an even share
            return micro_batch.vector.new_ones(self._layers[layer].num_experts)
        return self._layout.load(self._last, layer)

    def restore_offset(self, layer: int) -> None:
        """Writes the offset of ``layer`` into its slot, in float32, after a cast, a move or a step."""
        group, row = self._group_of[layer]
        if group.steering is None:
            return
        router, kind = self._layers[layer].router, self._layers[layer].kind
        name = kind.slot or OWN_SLOT
        slot, offset = router._buffers.get(name), group.steering.offset()
        if slot is None:
            return
        if slot.device != offset.device and slot.device.type != "meta":
            offset.data = offset.data.to(slot.device)
        if slot.dtype == offset.dtype and slot.device == offset.device:
            slot.detach().copy_(offset[row])
        elif slot.device.type != "meta":
            router._buffers[name] = offset[row].clone()

    def adopt_offset(self, layer: int) -> None:
        """A checkpoint was loaded into the family's slot: the offset becomes what it holds."""
        group, row = self._group_of[layer]
        slot = self._layers[layer].kind.slot
        if group.steering is None or slot is None:
            return
        held, offset = self._layers[layer].router._buffers[slot], group.steering.offset()[row]
        if held.device.type == "meta" or torch.equal(offset.to(held.dtype), held.to(offset.device)):
            self.restore_offset(layer)  # the checkpoint holds ours, perhaps rounded
        else:
            offset.copy_(held)

    # ---- the training loop ----

    def loss(self) -> Float[Tensor, ""]:
        """Closes the micro-batch and returns its balancing loss: add it to the loss of this forward.

        ``sum over balancers of coefficient * sum over layers of their loss``, a mean over the unmasked tokens of the
        micro-batch, as a mean cross-entropy is: weigh it as you weigh that. Its value is for logging, by the counts
        known now. Its backward carries no gradient itself; it tells the taps which factor the loss was given
        (1/accumulation steps, a GradScaler's scale), and they add the gradient at the router with the counts known
        then. 0 where no balancer has a loss or nothing was counted.
        """
        return self._ticket()

    @torch.compiler.disable
    def _ticket(self) -> Tensor:
        self._calls_loss = True
        micro_batch = self._window.close_micro_batch()
        if micro_batch is None or self._num_losses == 0:
            device = self._device() if micro_batch is None else micro_batch.vector.device
            self._last_micro_batch = micro_batch or self._last_micro_batch
            return torch.zeros((), device=device)
        self._last_micro_batch = micro_batch
        tokens = micro_batch.vector[self._layout.tokens].clamp_min(1)
        value = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for balancer, losses in zip(self._groups[0].losses, micro_batch.losses, strict=True):
            value = value + balancer.coefficient * (losses / tokens).sum()
        if self._context.given:
            self._context.clear()
        if not torch.is_grad_enabled():
            return value.float()
        leaf = torch.zeros((), device=value.device, requires_grad=True)
        return _Ticket.apply(leaf, value.float(), self._window, micro_batch)

    @torch.no_grad()
    def step(self, applied: bool | Tensor = True) -> None:
        """Closes the window: pools its counts over the ranks and moves the offsets. Call it after ``optimizer.step()``.

        Args:
            applied: whether the optimizer's step was applied, a bool or a 0-d tensor (a GradScaler skips steps). The
                window closes either way; the offsets move only if it was.

        Raises ``EquipoiseError`` when a router was not called in this window, naming it.
        """
        window = self._window
        called = [any(micro_batch.calls[i] for micro_batch in window.micro_batches) for i in range(len(self._layers))]
        if not all(called):
            missing = [layer.name for layer, was in zip(self._layers, called, strict=True) if not was]
            raise EquipoiseError(
                "every attached router must be called in training mode between two steps: "
                + (f"{', '.join(missing[:4])}{' ...' if missing[4:] else ''} got no token" if any(called) else "none was")
                + ". Call step() once an optimizer step, after a forward; leave layers out with attach(where=...)."
            )
        micro_batches = window.micro_batches
        self._last = window.close()
        self._last_micro_batches, self._last_micro_batch = micro_batches, micro_batches[-1]
        self._num_windows += 1
        if applied is False:
            return
        for group in self._groups:
            load = torch.stack([self._layout.load(self._last, layer) for layer in group.layers])
            for balancer in group.balancers:
                offset = balancer.offset()
                before = offset.clone() if isinstance(applied, Tensor) and offset is not None else None
                balancer.update(load)
                if before is not None:
                    offset.copy_(torch.where(applied.to(offset.device).bool(), offset, before))
            if group.steering is not None:
                for layer in group.layers:
                    self.restore_offset(layer)

    def follow(self, optimizer: torch.optim.Optimizer) -> Any:
        """Calls ``step()`` after every ``optimizer.step()``; ``remove()`` on what comes back ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    # ---- what counts ----

    @contextmanager
    def measuring(self) -> Iterator[dict[str, Int[Tensor, " experts"]]]:
        """Counts an evaluation, in any mode, and moves nothing; the open window is untouched.

        Yields a dict that is filled at the end: by layer, int64 ``[experts]``, summed over the ranks.
        """
        if self._measuring:
            raise EquipoiseError("measuring() must not be nested: it is open already. Leave the inner one out.")
        self._measuring, self._measured = True, None
        load: dict[str, Tensor] = {}
        try:
            yield load
            vector = self._layout.zeros(self._device()) if self._measured is None else self._measured
            work = self._pool.all_reduce(vector)
            if work is not None:
                work.wait()
            load.update(self._by_name(vector))
        finally:
            self._measuring, self._measured = False, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing, for forwards that are no training: generation, a probe. Offsets still steer."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def token_mask(self, mask: Tensor | None, sequence_ids: Tensor | None = None) -> None:
        """Says which tokens of the coming micro-batch count and which sequence each is in.

        Holds until the next ``loss()`` or ``step()`` and outranks an ``attention_mask`` that the model is called with.

        Args:
            mask: 1 for a token that counts, 0 for padding; ``[batch, sequence]`` or flat; None: all count.
            sequence_ids: an integer that changes where a new packed sequence begins; the same shape.
        """
        for name, value in (("mask", mask), ("sequence_ids", sequence_ids)):
            if value is not None and (not isinstance(value, Tensor) or value.dim() not in (1, 2)):
                raise ValueError(f"{name} must be a tensor [batch, sequence] or [tokens]: got {_shape(value)}.")
        self._context.mask, self._context.sequence_ids, self._context.given = mask, sequence_ids, True

    # ---- what comes out ----

    @property
    def load(self) -> dict[str, Int[Tensor, " experts"]]:
        if self._last is None:
            return self._by_name(self._layout.zeros(self._device()))
        return self._by_name(self._last)

    @property
    def offsets(self) -> dict[str, Float[Tensor, " experts"]]:
        return {layer.name: self._offset_of(index).clone() for index, layer in enumerate(self._layers)}

    @property
    def num_tokens(self) -> Int[Tensor, ""]:
        micro_batch = self._window.current or self._last_micro_batch
        if micro_batch is None:
            return torch.zeros((), dtype=torch.int64, device=self._device())
        return micro_batch.vector[self._layout.tokens].min()

    def metrics(self) -> dict[str, float]:
        """Figures of the last closed window over all ranks, as Python numbers (this waits for a GPU); {} before it.

        ``maxvio_batch``, ``min_violation``, ``coefficient_of_variation``, ``load_entropy``: means over layers.
        ``maxvio_micro``: mean over this rank's micro-batches. ``maxvio_floor``: what chance alone would give.
        ``dead_experts``: sum over layers. ``tokens``: unmasked, in the window. ``load_balancing_loss``: the first
        loss's mean over layers and this rank's micro-batches, 1 at balance. ``offset_max``: largest magnitude.
        """
        if self._last is None:
            return {}
        load = self.load
        tokens = float(self._last[self._layout.tokens].min())
        floors = [metrics.sampling_floor(tokens, layer.k, layer.num_experts) for layer in self._layers]
        micro = [metrics.max_violation(self._by_name(m.vector)) for m in self._last_micro_batches]
        result = {
            "maxvio_batch": float(metrics.max_violation(load)),
            "maxvio_micro": float(torch.stack(micro).nanmean()),
            "maxvio_floor": sum(floors) / len(floors),
            "min_violation": float(metrics.min_violation(load)),
            "coefficient_of_variation": float(metrics.coefficient_of_variation(load)),
            "load_entropy": float(metrics.load_entropy(load)),
            "dead_experts": float(metrics.dead_experts(load)),
            "tokens": tokens,
        }
        if self._num_losses:
            values = [m.losses[0] / m.vector[self._layout.tokens].clamp_min(1) for m in self._last_micro_batches]
            result["load_balancing_loss"] = float(torch.stack(values).mean())
        if any(group.steering is not None for group in self._groups):
            result["offset_max"] = max(float(offset.abs().max()) for offset in self.offsets.values())
        return result

    def notes(self, num_steps: int) -> list[str]:
        """What a user should know before a run of this many steps, a sentence each."""
        return [note for balancer in self._groups[0].balancers for note in balancer.notes(num_steps)]

    def state_dict(self) -> dict[str, Any]:
        """Offsets, the last window's counts and the number of windows: equal on all ranks, legal between windows only."""
        if self._window.micro_batches:
            raise EquipoiseError(
                "state_dict() must be called between windows: "
                f"{len(self._window.micro_batches)} micro-batch(es) were counted since the last step(). Call step() first."
            )
        load = {name: counts.clone() for name, counts in self.load.items()}
        return {"strategy": self._strategy, "num_windows": self._num_windows, "offsets": self.offsets, "load": load}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict`` gave; the state of another model is refused before anything moves."""
        if self._window.micro_batches:
            raise EquipoiseError("load_state_dict() must be called between windows. Call step() first.")
        names = {layer.name: layer.num_experts for layer in self._layers}
        for key in ("offsets", "load"):
            if key == "load" and key not in state:
                continue
            sizes = {name: len(value) for name, value in state.get(key, {}).items()}
            if sizes != names:
                raise EquipoiseError(
                    f"the state must be of a model with the same layers: its {key} have {_few(sizes)}, this model has "
                    f"{_few(names)}. Load the state that was saved with this model."
                )
        for index, layer in enumerate(self._layers):
            group, row = self._group_of[index]
            if group.steering is not None:
                group.steering.offset()[row].copy_(state["offsets"][layer.name])
                self.restore_offset(index)
        self._num_windows = int(state["num_windows"])
        self._last = None
        if self._num_windows and "load" in state:
            self._last = self._layout.zeros(self._device())
            for index, layer in enumerate(self._layers):
                self._layout.load(self._last, index).copy_(state["load"][layer.name])
            self._last_micro_batches = []

    def detach(self) -> dict[str, Float[Tensor, " experts"]]:
        """Removes all that ``attach`` added and returns the offsets. A family's own slot keeps what it holds; the
        offsets of a family without one are gone from the model."""
        offsets = self.offsets
        for hook in self._hooks:
            hook.remove()
        for layer, tap in zip(self._layers, self._taps, strict=True):
            tap.observer = None
            untap_router(layer.router)
        self._hooks, self._taps = [], []
        return offsets

    def __repr__(self) -> str:
        return f"Balance({self._strategy!r}, {len(self._layers)} layers of {_few(set(self._layout.num_experts))} experts)"

    # ---- helpers ----

    def _device(self) -> torch.device:
        return self._layers[0].router.weight.device

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        return {layer.name: self._layout.load(vector, index) for index, layer in enumerate(self._layers)}

    def _offset_of(self, layer: int) -> Tensor:
        group, row = self._group_of[layer]
        if group.steering is not None:
            return group.steering.offset()[row]
        return _slot_of(self._layers[layer])


def _slot_of(layer: _Layer) -> Float[Tensor, " experts"]:
    """What steers a router now, float32: its family's slot, a slot of ours from an earlier attach, or nothing."""
    held = layer.router._buffers.get(layer.kind.slot or OWN_SLOT)
    if held is None or held.device.type == "meta":
        device = "cpu" if layer.router.weight.device.type == "meta" else layer.router.weight.device
        return torch.zeros(layer.num_experts, device=device)
    return held.detach().float().clone()


def _few(values: Any) -> str:
    values = [f"{k} [{v}]" for k, v in values.items()] if isinstance(values, Mapping) else [str(v) for v in values]
    return ", ".join(values[:3]) + (f" ... ({len(values)} in all)" if len(values) > 3 else "") if values else "none"


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _fit(mask: Tensor | None, num_tokens: int, name: str) -> Float[Tensor, " tokens"] | None:
    """The mask of these tokens, 0 or 1, a copy. A cached prefix makes a 2-D mask longer than the input: its end counts."""
    if mask is None:
        return None
    if mask.dim() == 2 and mask.numel() > num_tokens and num_tokens % mask.shape[0] == 0:
        mask = mask[:, -(num_tokens // mask.shape[0]) :]
    if mask.numel() != num_tokens:
        raise EquipoiseError(
            f"the mask must hold one number per token that {name} routes: got {_shape(mask)} for {num_tokens} tokens. "
            "Pass the mask of these tokens with balance.token_mask(mask)."
        )
    return (mask.reshape(-1) != 0).float()


def _segments(
    sequence_ids: Tensor | None, rows: int, num_tokens: int, device: torch.device
) -> tuple[Int[Tensor, " tokens"] | None, int]:
    """Numbers the sequences 0, 1, ...: rows of the batch, or wherever the given ids change."""
    if sequence_ids is not None:
        ids = sequence_ids.reshape(1, -1) if sequence_ids.dim() == 1 else sequence_ids
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return starts.reshape(-1).cumsum(0).sub_(1).to(device), num_tokens
    if rows <= 0 or num_tokens % rows:
        return None, 0
    return torch.arange(num_tokens, device=device) // (num_tokens // rows), rows


def _signature(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _allow_compile_over_checkpoint() -> None:
    """Lets a compiled graph hold our top-k mode inside an activation checkpoint.

    The mode is entered and left within a router's forward, but Dynamo sees a side effect of the checkpointed function
    and refuses unless side effects may be skipped in the recomputation. Skipping is right here: the mode is empty again.
    """
    import torch._dynamo

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def _reset_dynamo(model: nn.Module) -> None:
    """Graphs that were compiled before the taps were there would go on without them."""
    dynamo = sys.modules.get("torch._dynamo")
    compiled = hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())
    if dynamo is not None and compiled and dynamo.utils.counters["frames"]["total"]:
        _log.warning(
            "attach: the model was compiled and called before; compiled graphs are dropped (torch._dynamo.reset) and "
            "made anew. Attach before the first call to save that."
        )
        dynamo.reset()


def _read_offsets(offsets: Mapping[str, Tensor] | str | os.PathLike[str], layers: list[_Layer]) -> dict[str, Tensor]:
    if not isinstance(offsets, Mapping):
        path = Path(offsets)
        path = path / OFFSETS_FILE if path.is_dir() else path
        if not path.exists():
            raise EquipoiseError(f"offsets must be a mapping or a saved file: {path} does not exist.")
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise EquipoiseError("reading saved offsets needs safetensors: pip install safetensors.") from None
        offsets = load_file(path)
    sizes = {name: tuple(value.shape) for name, value in offsets.items()}
    wanted = {layer.name: (layer.num_experts,) for layer in layers}
    if sizes != wanted:
        raise EquipoiseError(
            f"offsets must name the layers of this model: got {_few(sizes)}, expected {_few(wanted)}."
        )
    return {
        layer.name: offsets[layer.name].detach().float().to(_slot_of(layer).device, copy=True) for layer in layers
    }


OFFSETS_FILE = "equipoise_offsets.safetensors"


def _resolve(balancers: Sequence[Balancer | str]) -> list[Balancer]:
    result: list[Balancer] = []
    for balancer in balancers:
        if isinstance(balancer, str):
            result += parse_strategy(balancer)
        elif isinstance(balancer, Balancer):
            result.append(balancer)
        else:
            raise TypeError(
                f"a balancer must be an object such as LossFree() or a strategy string: got {type(balancer).__name__}."
            )
    steering = [str(balancer) for balancer in result if balancer.has_offset]
    if len(steering) > 1:
        raise ValueError(f"one balancer may move the offset: got {' and '.join(steering)}. Leave one out.")
    return result


def attach(
    model: nn.Module,
    *balancers: Balancer | str,
    where: Callable[[str, nn.Module], bool] | None = None,
    group: Any | None = None,
    offsets: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
) -> Balance:
    """Attaches balancers to the mixture-of-experts model you already have.

        balance = equipoise.attach(model, LossFree(rate=1e-3), LoadBalancingLoss(1e-4, scope="sequence"))
        loss = model(**micro_batch).loss + balance.loss()      # every micro-batch
        optimizer.step(); balance.step()                       # every optimizer step

    Args:
        model: the model; may be wrapped (DDP, FSDP2, compiled).
        balancers: mechanisms, as objects or strategy strings; none at all only counts.
        where: ``where(name, router) -> bool`` chooses layers; default all.
        group: the process group, or a ``DeviceMesh``, whose ranks hold different tokens; default the world.
        offsets: by layer, the offsets to begin with, or the path of saved ones; default what the model's slots hold.

    With balancers at offset zero and without losses, logits, weights, choices and gradients of the model are the same
    bit for bit. Collective over ``group``: every rank compares layers and strategies and raises the same error when
    they differ. Raises ``EquipoiseError`` when the model holds no router that is known, or one that behaves otherwise
    than its family, or when it is attached already.
    """
    inner = _unwrap(model)
    pool = Pool(_process_group(group))
    error: Exception | None = None
    fingerprint: Any = None
    try:
        resolved = _resolve(balancers)
        layers = _find_layers(inner, where)
        start = {layer.name: _slot_of(layer) for layer in layers} if offsets is None else _read_offsets(offsets, layers)
        fingerprint = (format_strategy(resolved), [(x.name, x.num_experts, x.k, x.kind) for x in layers])
    except Exception as caught:
        error = caught
    everyone = pool.gather((fingerprint, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for rank, (theirs, their_error) in enumerate(everyone):
        if their_error is not None:
            raise EquipoiseError(f"attach must succeed on every rank: on rank {rank} of the group, {their_error}")
        if theirs != everyone[0][0]:
            raise EquipoiseError(
                "every rank must attach the same strategy to the same layers: rank 0 of the group has "
                f"{_describe(everyone[0][0])}, rank {rank} has {_describe(theirs)}."
            )
    _reset_dynamo(model)
    for layer in layers:
        if "_equipoise" in layer.router.__dict__:  # a copy of an attached model: take its inert tap off
            untap_router(layer.router)
    return Balance(inner, layers, resolved, pool, start)


def _describe(fingerprint: Any) -> str:
    strategy, layers = fingerprint
    return f"{strategy} on {_few({name: size for name, size, _, _ in layers})}"


def _process_group(group: Any | None) -> Any | None:
    get_group = getattr(group, "get_group", None)  # a DeviceMesh of one dimension
    if get_group is None:
        return group
    if group.ndim != 1:
        group = group._flatten()
    return group.get_group()


def _find_layers(model: nn.Module, where: Callable[[str, nn.Module], bool] | None) -> list[_Layer]:
    layers, proven = [], {}
    for name, router, kind in find_routers(model):
        if where is not None and not where(name, router):
            continue
        if is_tapped(router):
            raise EquipoiseError(
                f"a router must be attached once: {name} is attached already. Call detach() on its Balance first."
            )
        key = (type(router), num_experts_of(router), tuple(sorted((k, str(v)) for k, v in vars(router).items() if isinstance(v, int | float | str))))
        if key not in proven:
            proven[key] = prove(name, router, kind)
        layers.append(_Layer(name, router, kind, num_experts_of(router), proven[key]))
    if not layers:
        raise EquipoiseError("where must choose at least one router: it chose none.")
    return layers
