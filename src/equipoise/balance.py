"""Ties the routers of a model to balancers: counts, pools over ranks, steps, saves."""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise import metrics
from equipoise._text import abbreviate
from equipoise.balancers import Balancer, format_strategy
from equipoise.counting.pool import Pool, digest
from equipoise.counting.recorder import Layer, Recorder, slot_of
from equipoise.counting.window import MicroBatch, Window
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.forward import ForwardContext
from equipoise.routers.tap import OWN_SLOT, Tap, tap_router, untap_router
from equipoise.saved import write_biases

__all__ = ["Balance"]

UNUSED_MASK = (
    "token_mask() must be called before the forward of its micro-batch, and after the last one's loss() or step(): no "
    "forward came after it."
)
_log = logging.getLogger("equipoise")


class _Ticket(torch.autograd.Function):
    """A scalar whose backward tells the micro-batch which factor its loss was given."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, window: Window, micro_batch: MicroBatch) -> Tensor:
        ctx.window, ctx.micro_batch = window, micro_batch
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if ctx.micro_batch not in ctx.window.micro_batches:
            raise EquipoiseError(
                "a backward must run before step() closes its window: it ran after. Call balance.step() after the "
                "optimizer's step."
            )
        ctx.micro_batch.serve(grad)
        ctx.window.serving = ctx.micro_batch
        return None, None, None, None


class Balance:
    """The balancing of one model; made by ``attach``.

    In a training loop, per micro-batch ``loss = model(...).loss + balance.loss()``; per optimizer step, after it,
    ``balance.step()``. See ``attach``.

    Attributes:
        load: by layer, the counts of the last closed window over all ranks, int64 ``[experts]``.
        biases: by layer, what is added to the scores for the choice, float32 ``[experts]``.
        num_tokens: unmasked tokens of the open micro-batch on this rank, or of the last one (int64 scalar).
        loss_scale: the factor of the losses where no ticket can be added (a pipeline stage, ``torch.autograd.grad``).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        balancers: Sequence[Balancer],
        pool: Pool,
        biases: dict[str, Tensor],
    ):
        self._layers = layers
        self._strategy = format_strategy(balancers)
        self._multiplies = any(balancer.multiplies for balancer in balancers)
        self._pool = pool
        self._recorder = Recorder(layers, balancers, pool, biases)
        self._layout, self._window, self._groups = self._recorder.layout, self._recorder.window, self._recorder.groups
        self._num_windows = 0
        self._traffic = [0, 0]
        self._detached = False
        self._warned: set[tuple[str, int]] = set()
        self._device_of_model = next(model.parameters(), torch.zeros(())).device
        self._last_micro_batches: list[MicroBatch] = []
        self._last_micro_batch: MicroBatch | None = None
        self._calls_at_mask = 0
        self._has_config = hasattr(model, "save_pretrained")
        self._tap(model)

    @property
    def loss_scale(self) -> float | Tensor | None:
        return self._recorder.loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float | Tensor | None) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"loss_scale must be a finite number, a tensor of one or None: got {value!r}.")
        self._recorder.loss_scale = value.reshape(()) if isinstance(value, Tensor) else value

    def _tap(self, model: nn.Module) -> None:
        self._context = ForwardContext(model, self._recorder)
        self._hooks = self._context.listen({layer.router for layer in self._layers})
        self._recorder.context = self._context
        self._taps = []
        for index, layer in enumerate(self._layers):
            group, row = self._recorder.group_of[index]
            tap = Tap(self._recorder, self._context, index, layer.kind, layer.k, has_loss=bool(group.losses))
            own = None
            if group.steering is not None and group.slot(layer).name == OWN_SLOT:
                own = group.steering.bias()[row].clone()
                tap.multiplies = group.steering.multiplies
                _allow_compile_over_checkpoint()
            tap_router(layer.router, tap, layer.slot, own)
            self._taps.append(tap)
            self._recorder.restore_bias(index)

    # ---- the training loop ----

    def loss(self) -> Float[Tensor, ""]:
        """Closes the micro-batch and returns its balancing loss: add it to the loss of this forward.

        ``sum over balancers of coefficient * sum over layers of their loss``, a mean over the unmasked tokens of the
        micro-batch, as a mean cross-entropy is: weigh it as you weigh that. Its value is for logging, by the counts
        known now. Its backward carries no gradient itself; it tells the taps which factor the loss was given
        (1/accumulation steps, a GradScaler's scale), and they add the gradient at the router with the counts known
        then. 0 where no balancer has a loss or nothing was counted.

        That gradient is a constant to autograd: a second derivative (``create_graph=True``) leaves the balancing out.
        A gradient for some tensors only (``torch.autograd.grad``, ``backward(inputs=...)``) does not run the backward
        of this loss: set ``loss_scale`` instead of adding it.
        """
        return self._ticket()

    @torch._disable_dynamo  # as torch.compiler.disable, which loads Dynamo at once
    def _ticket(self) -> Tensor:
        if self._context.told and self._mask_is_unused():
            raise EquipoiseError(UNUSED_MASK)
        micro_batch = self._window.close_micro_batch()
        if micro_batch is not None:  # it separates micro-batches; one for logging between windows does not
            self._recorder.has_tickets = True
        if self._context.told:
            self._context.clear()
        if micro_batch is None or self._recorder.num_losses == 0:
            device = self._device() if micro_batch is None else micro_batch.vector.device
            self._last_micro_batch = micro_batch or self._last_micro_batch
            return torch.zeros((), device=device)
        self._last_micro_batch = micro_batch
        tokens = micro_batch.vector[self._layout.tokens].clamp_min(1)
        value = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for balancer, losses in zip(self._groups[0].losses, micro_batch.losses, strict=True):
            value = value + balancer.coefficient * (losses / tokens).sum()
        value = value.to(micro_batch.dtype)
        if not torch.is_grad_enabled():
            return value
        leaf = torch.zeros_like(value, requires_grad=True)
        return _Ticket.apply(leaf, value, self._window, micro_batch)

    @torch.no_grad()
    def step(self, applied: bool | Tensor = True) -> None:
        """Closes the window: pools its counts over the ranks and moves the biases. Call it after ``optimizer.step()``.

        Under Accelerate's ``accumulate`` that does nothing but for the last micro-batch: call it only
        ``if accelerator.sync_gradients``, or ``follow`` the optimizer inside.

        Args:
            applied: whether the optimizer's step was applied, a bool or a 0-d tensor (a GradScaler skips steps). The
                window closes either way; the biases move only if it was, on every rank.

        A router that was not called on any rank keeps its bias (but for what is left of a momentum); each one that a
        rank does not call is warned of once there, and so is one that the loss gave no gradient. Collective over the
        group. Raises ``EquipoiseError`` when a rank called none at all; the other ranks raise too.
        """
        if not isinstance(applied, bool) and not (isinstance(applied, Tensor) and applied.numel() == 1):
            raise ValueError(f"applied must be true, false or a tensor of one number: got {_shape(applied)}.")
        if isinstance(applied, Tensor):
            applied = applied.reshape(())
            if applied.device.type == "cpu" != self._device().type:
                applied = bool(applied)  # on the host already
        self._pool.check_alone()
        if self._detached:
            raise EquipoiseError(
                "step() must be called before detach(): this Balance was detached. Attach the model again."
            )
        if not self._layers:  # a pipeline stage of dense layers
            self._num_windows += 1
            self._context.clear()
            return
        window = self._window
        called = set().union(*(micro_batch.calls for micro_batch in window.micro_batches))
        if not called:
            window.fail(self._device(), self._recorder.empty_statistics())
            raise EquipoiseError(
                "attached routers must be called in training mode between two steps: none was. Call step() once an "
                "optimizer step, after a forward (follow(optimizer) calls it already)."
            )
        absent = None
        if len(called) < len(self._layers):
            absent = self._recorder.empty_statistics()
            self._warn("no call", [index for index in range(len(self._layers)) if index not in called])
        if self._recorder.num_losses:
            self._warn("no gradient", self._recorder.unreached())
        if self._recorder.not_masked:
            self._warn("no mask", sorted(self._recorder.not_masked))
        if self._context.told and self._mask_is_unused():
            _log.warning(UNUSED_MASK)
        micro_batches, before = window.micro_batches, self._num_windows
        self._recorder.last, statistics, applied, *self._traffic = window.close(applied, absent)
        self._last_micro_batches, self._last_micro_batch = micro_batches, micro_batches[-1]
        self._num_windows += 1
        if self._context.told:
            self._context.clear()
        if applied is False:
            return
        for group in self._groups:
            slots = self._recorder.adopt_writes(group)
            load = self._recorder.load_of(group, self._recorder.last)
            for index, balancer in enumerate(group.balancers):
                there = statistics.values
                found = [there[layer, index] for layer in group.layers if (layer, index) in there] if there else []
                state = _state(balancer) if isinstance(applied, Tensor) else {}
                held = {name: value.clone() for name, value in state.items()}
                balancer.update(load, found or None, before)
                for name, value in held.items():
                    assert isinstance(applied, Tensor)
                    state[name].copy_(torch.where(applied.to(value.device).bool(), state[name], value))
            if group.steering is not None:
                self._recorder.restore_biases(group, slots)

    def _warn(self, what: str, layers: Sequence[int]) -> None:
        """Once for each layer."""
        new = [index for index in layers if (what, index) not in self._warned]
        self._warned.update((what, index) for index in new)
        names = abbreviate(self._layers[index].name for index in new)
        if new and what == "no call":
            _log.warning(
                f"step: {names} got no token between two steps, in training mode on this rank. That is as it should be "
                "where a layer serves a kind of text or images that is not in every batch; leave one that is never "
                "called out with attach(where=...)."
            )
        elif new and what == "no mask":
            shape, num_tokens = self._recorder.not_masked[new[0]]
            _log.warning(
                f"step: {names} routes other tokens than those of the attention_mask ({num_tokens}, its shape is "
                f"{shape}): all of them were counted. Say which are padding with balance.token_mask(mask, where=...); "
                "a longer mask is taken by its end, as for layers that predict further."
            )
        elif new:
            _log.warning(
                f"step: the balancing loss gave {names} no gradient: its weights were part of no loss that was "
                "differentiated. So it is where a branch ends early or is detached; else its block makes weights of "
                "its own, in place of multiplying the outputs of experts with those that the router returns."
            )

    def follow(self, optimizer: torch.optim.Optimizer) -> Any:
        """Calls ``step()`` after every ``optimizer.step()``; ``remove()`` on what comes back ends it.

        A step that a GradScaler skips, or that raises, does not get that far: close its window with
        ``step(applied=False)``, else its counts are part of the next one. A fused optimizer, which a GradScaler always
        calls and which skips by itself, closes it so without being told. ``optimizer`` is one of torch; of one that
        Accelerate prepared, pass ``optimizer.optimizer``.
        """
        if not isinstance(getattr(optimizer, "_optimizer_step_post_hooks", None), Mapping):
            raise TypeError(
                f"optimizer must be one of torch, whose steps have hooks: got {type(optimizer).__name__}. Pass the "
                "one that it wraps, as optimizer.optimizer, or call step() yourself."
            )

        hooks = optimizer._optimizer_step_post_hooks
        if any(getattr(hook, "_equipoise", None) is self for hook in hooks.values()):
            raise UsageError(
                "follow() must be called once for an optimizer: this one is followed already, and a second step() "
                "would find an empty window. Leave it out, or remove() the first."
            )

        @torch._disable_dynamo  # where the step is compiled
        def after(*_: Any) -> None:
            if _is_step_of_training(optimizer):
                self.step(applied=was_applied(optimizer))

        after._equipoise = self  # type: ignore[attr-defined]
        return optimizer.register_step_post_hook(after)

    # ---- what counts ----

    @contextmanager
    def measuring(self) -> Iterator[dict[str, Int[Tensor, " experts"]]]:
        """Counts an evaluation, in any mode, and moves nothing; the open window is untouched.

        Yields a dict that is filled at the end: by layer, int64 ``[experts]``, summed over the ranks. Collective over
        the group: every rank enters and leaves it, also one without a batch.
        """
        if self._recorder.measuring:
            raise EquipoiseError("measuring() must not be nested: it is open already. Leave the inner one out.")
        self._pool.check_alone()
        self._recorder.measuring, self._recorder.measured = True, None
        load: dict[str, Tensor] = {}
        try:
            try:
                with self._context.aside():
                    yield load
            except Exception:
                with suppress(RuntimeError):  # the others may be gone
                    self._window.exchange.fail(self._device())
                raise
            vector = self._layout.zeros(self._device()) if self._recorder.measured is None else self._recorder.measured
            self._window.exchange.measure(vector)
            load.update(self._by_name(vector))
        finally:
            self._recorder.measuring, self._recorder.measured = False, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing, for forwards that are no training: generation, a probe. Biases still steer."""
        before, self._recorder.paused = self._recorder.paused, True
        try:
            with self._context.aside():
                yield
        finally:
            self._recorder.paused = before

    def token_mask(
        self,
        mask: Tensor | None,
        sequence_ids: Tensor | None = None,
        *,
        where: Callable[[str], bool] | None = None,
    ) -> None:
        """Says which tokens of the coming micro-batch count and which sequence each is in.

        Holds until the next ``loss()`` or ``step()`` and outranks an ``attention_mask`` that the model is called with.
        Inside ``measuring()`` and ``paused()`` it is put aside, and one that is given there ends with them.

        An ``attention_mask`` is taken for routers of as many tokens as it has (or one fewer of every row, its end, in a
        layer that predicts a token further); of others, as those of images beside a text, all tokens count, and a
        warning says so. The number of tokens does not say what they are: where several kinds go through one model, give
        each its own mask with ``where``.

        Args:
            mask: 1 for a token that counts, 0 for padding; ``[batch, sequence]`` or flat; None: all count. Of a 2-D
                mask that is longer than what a router sees (a cached prefix, a layer that predicts further) the end
                counts: give it the columns that the model is called with.
            sequence_ids: an integer that changes where a new packed sequence begins; the same shape.
            where: which layers it is for, by their names (``balance.load`` has them); call it once for each kind of
                tokens. None: for all that have none of their own.
        """
        for name, value in (("mask", mask), ("sequence_ids", sequence_ids)):
            if value is not None and (not isinstance(value, Tensor) or value.dim() not in (1, 2)):
                raise ValueError(f"{name} must be a tensor [batch, sequence] or [tokens]: got {_shape(value)}.")
        if mask is not None and mask.device.type == "cpu" and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                "mask must hold 1 for a token that counts and 0 for padding: got other values. Labels, and masks that "
                "are added to attention scores, are not masks of tokens."
            )
        if where is None:
            self._context.mask, self._context.sequence_ids, self._context.given = mask, sequence_ids, True
        else:
            chosen = [index for index, layer in enumerate(self._layers) if where(layer.name)]
            if not chosen:
                raise ValueError(
                    f"where must choose a layer: it chooses none of {abbreviate(x.name for x in self._layers)}."
                )
            self._context.of_layers |= dict.fromkeys(chosen, (mask, sequence_ids))
        self._calls_at_mask = self._recorder.num_calls

    def _mask_is_unused(self) -> bool:
        training = bool(self._layers) and self._context.model.training  # else nothing is counted, masked or not
        return training and self._recorder.num_calls == self._calls_at_mask

    # ---- what comes out ----

    @property
    def load(self) -> dict[str, Int[Tensor, " experts"]]:
        self._window.exchange.read()
        if self._recorder.last is None:
            return self._by_name(self._layout.zeros(self._device()))
        return self._by_name(self._recorder.last)

    @property
    def biases(self) -> dict[str, Float[Tensor, " experts"]]:
        return {layer.name: self._bias_of(index).clone() for index, layer in enumerate(self._layers)}

    @property
    def num_tokens(self) -> Int[Tensor, ""]:
        micro_batch = self._window.current or self._last_micro_batch
        if micro_batch is None:
            return torch.zeros((), dtype=torch.int64, device=self._device())
        tokens = micro_batch.vector[self._layout.tokens]
        return torch.stack([tokens[layer] for layer in sorted(micro_batch.calls)]).min()

    def metrics(self) -> dict[str, float]:
        """Figures of the last closed window over all ranks, as Python numbers (this waits for a GPU); {} before it.

        Of layers that had tokens; ``maxvio_batch``, ``min_violation``, ``coefficient_of_variation``, ``load_entropy``:
        means over them.
        ``maxvio_micro``: mean over this rank's micro-batches. ``maxvio_floor``: what chance alone would give.
        ``dead_experts``: sum over layers. ``tokens``: unmasked, in the window. ``load_balancing_loss``, ``z_loss``: by
        loss, without its coefficient, the mean over layers and this rank's micro-batches; a second loss of a kind has
        its scope behind its name. ``bias_max``: largest magnitude. ``collectives``, ``collective_bytes``: begun for
        the window, and what this rank gave to them.
        """
        self._window.exchange.read()
        if self._recorder.last is None:
            return {}
        load = _with_tokens(self._by_name(self._recorder.last.cpu()))
        layers = [layer for layer in self._layers if layer.name in load]
        tokens = [float(load[layer.name].sum()) / layer.k for layer in layers]
        floors = [
            metrics.sampling_floor(n, layer.k, layer.num_experts) for n, layer in zip(tokens, layers, strict=True)
        ]
        result = {
            "maxvio_batch": float(metrics.max_violation(load)),
            "maxvio_floor": sum(floors) / len(floors),
            "min_violation": float(metrics.min_violation(load)),
            "coefficient_of_variation": float(metrics.coefficient_of_variation(load)),
            "load_entropy": float(metrics.load_entropy(load)),
            "dead_experts": float(metrics.dead_experts(load)),
            "tokens": min(tokens),
        }
        if self._last_micro_batches:  # not after a resume
            micro = [
                metrics.max_violation(_with_tokens(self._by_name(m.vector.cpu()))) for m in self._last_micro_batches
            ]
            result["maxvio_micro"] = float(torch.stack(micro).nanmean())
        counted = [m for m in self._last_micro_batches if m.vector[self._layout.tokens].any()]
        for index, balancer in enumerate(self._groups[0].losses):
            tokens_of = [m.vector[self._layout.tokens] for m in counted]
            values = [(m.losses[index] / n)[n > 0] for m, n in zip(counted, tokens_of, strict=True)]
            name = balancer.metric if balancer.metric not in result else f"{balancer.metric}_{balancer.scope}"
            if self._last_micro_batches:
                result[name] = float(torch.cat(values).mean()) if values else 0.0
        if any(group.steering is not None for group in self._groups):
            result["bias_max"] = max(float(bias.abs().max()) for bias in self.biases.values())
        result |= zip(("collectives", "collective_bytes"), map(float, self._traffic), strict=True)
        return result

    def notes(self, num_steps: int) -> list[str]:
        """What a user should know before a run of this many steps, a sentence each."""
        notes = [n for group in self._groups for balancer in group.balancers for n in balancer.notes(num_steps)]
        return list(dict.fromkeys(notes))

    def save_biases(self, folder: str | os.PathLike[str]) -> Path | None:
        """Keeps the biases beside weights that were saved into ``folder``; returns the file.

        Call it after ``model.save_pretrained(folder)``. A family with a slot has them among its weights, and nothing is
        written (None), nor for a strategy that holds no biases. Of the others ``equipoise_biases.safetensors`` is
        written, in float32, and named in config.json: ``attach`` begins with it when the model is loaded from there;
        plain Transformers routes without. On many ranks the first one calls it.
        """
        place = Path(folder)
        steered = any(group.steering is not None for group in self._groups)
        beside = any(layer.slot is None for layer in self._layers) or self._multiplies
        named = any((place / name).is_file() for name in ("config.json", "adapter_config.json"))
        if not place.is_dir() or (steered and beside and self._has_config and not named):
            raise UsageError(
                f"folder must be one that the model was saved into: {place} is none. Save the model first, as with "
                "model.save_pretrained(folder), which writes the config.json that names the biases."
            )
        return write_biases(place, self.biases, self._multiplies) if steered and beside else None

    def state_dict(self) -> dict[str, Any]:
        """Biases and what moves with them, the last window's counts, the number of windows: equal on all ranks.

        Legal between windows only.
        """
        if self._window.micro_batches:
            raise EquipoiseError(
                "state_dict() must be called between windows: "
                f"{len(self._window.micro_batches)} micro-batch(es) were counted since the last one. Call step() first."
            )
        load = {name: counts.clone() for name, counts in self.load.items()}
        state: dict[str, dict[str, Tensor]] = {}
        for index, layer in enumerate(self._layers):
            group, row = self._recorder.group_of[index]
            for name, value in group.states().items():
                state.setdefault(name, {})[layer.name] = value[row].clone()
        return {
            "strategy": self._strategy,
            "num_windows": self._num_windows,
            "biases": self.biases,
            "multiplies": self._multiplies,
            "state": state,
            "load": load,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict`` gave; the state of another model is refused before anything moves.

        What only another strategy keeps (a momentum) is left out, and what that state lacks begins at zero. Collective
        over the group: every rank loads the same state, whatever number of ranks saved it.
        """
        error = None
        self._pool.check_alone()
        self._window.exchange.read()
        try:
            self._check_state(state)
        except Exception as caught:
            error = caught
        told = None if error else (state["num_windows"], {key: digest(value) for key, value in state.items()})
        states = self._pool.agree("load_state_dict", told, error)
        for rank, theirs in enumerate(states):
            if theirs != states[0]:
                (first, one), (windows, other) = states[0], theirs
                parts = ", ".join(sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)))
                raise EquipoiseError(
                    f"every rank must load the same state: rank 0 of the group has one after {first} windows, rank "
                    f"{rank} one after {windows}, and they differ in {parts}. Load the same checkpoint on all."
                )
        for index, layer in enumerate(self._layers):
            group, row = self._recorder.group_of[index]
            if group.steering is not None:
                group.steering.bias()[row].copy_(state["biases"][layer.name])
            for name, value in group.states().items():
                held = state.get("state", {}).get(name)
                value[row].copy_(torch.zeros_like(value[row]) if held is None else held[layer.name])
            self._recorder.restore_bias(index)
        self._num_windows = int(state["num_windows"])
        self._recorder.last = None
        if self._num_windows and "load" in state:
            self._recorder.last = self._layout.zeros(self._device())
            for index, layer in enumerate(self._layers):
                self._layout.load(self._recorder.last, index).copy_(state["load"][layer.name])
            self._last_micro_batches = []

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if self._window.micro_batches:
            raise EquipoiseError("load_state_dict() must be called between windows. Call step() first.")
        if not isinstance(state, Mapping) or not isinstance(state.get("biases", {}), Mapping):
            raise EquipoiseError(f"the state must be what state_dict() gave: got {type(state).__name__}.")
        names = {layer.name: (layer.num_experts,) for layer in self._layers}
        parts = {key: state.get(key, {}) for key in ("biases", "load") if key in state or key == "biases"}
        for key, part in {**parts, **state.get("state", {})}.items():
            sizes = {name: tuple(value.shape) for name, value in part.items()}
            windows = state.get("num_windows")
            if sizes != names or not isinstance(windows, int) or isinstance(windows, bool) or windows < 0:
                raise EquipoiseError(
                    f"the state must be of a model with the same layers: its {key} have {abbreviate(sizes)}, this model has "
                    f"{abbreviate(names)}. Load the state that was saved with this model."
                )
            for name, value in part.items():
                if (value < 0).any() or value.dtype != torch.int64 if key == "load" else not value.isfinite().all():
                    raise EquipoiseError(
                        f"the state must hold {'int64 counts' if key == 'load' else 'finite numbers'}: its {key} of "
                        f"{name} are not. The file is damaged, or training had diverged; load an earlier one."
                    )
        if self._multiplies != state.get("multiplies", False):
            raise EquipoiseError(
                "biases that are added and biases that multiply cannot take each other's place: the state is of "
                f"{state.get('strategy')}, this Balance has {self._strategy}. Attach the strategy of the state."
            )
        for index, layer in enumerate(self._layers):
            group, _ = self._recorder.group_of[index]
            if group.steering is None and not torch.equal(
                state["biases"][layer.name].cpu(), self._bias_of(index).cpu()
            ):
                raise EquipoiseError(
                    f"biases must have a balancer that holds them: the state of {state.get('strategy')} moves the "
                    f"choice of {layer.name}, this Balance has {self._strategy}. Attach with frozen or loss-free too."
                )

    def detach(self) -> dict[str, Float[Tensor, " experts"]]:
        """Removes all that ``attach`` added and returns the biases. A family's own slot keeps what it holds; the
        biases of a family without one are gone from the model. On every rank of the group, or on none."""
        biases = self.biases
        for hook in self._hooks:
            hook.remove()
        if self._detached:
            return biases
        self._detached = True
        for layer, tap in zip(self._layers, self._taps, strict=True):
            tap.observer = None
            untap_router(layer.router, layer.slot)
        self._hooks, self._taps = [], []
        self._pool.close()
        return biases

    def __repr__(self) -> str:
        sizes = f" of {abbreviate(sorted(set(self._layout.num_experts)))} experts" if self._layers else ""
        return f"Balance({self._strategy!r}, {len(self._layers)} layers{sizes})"

    # ---- helpers ----

    def _device(self) -> torch.device:
        if not self._layers:
            return self._device_of_model
        return next(self._layers[0].router.parameters()).device  # some have their matrix in a module inside

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        return {layer.name: self._layout.load(vector, index) for index, layer in enumerate(self._layers)}

    def _bias_of(self, layer: int) -> Tensor:
        group, row = self._recorder.group_of[layer]
        if group.steering is not None:
            self._recorder.adopt_writes(group)
            return group.steering.bias()[row]
        return slot_of(self._layers[layer])


def _state(balancer: Balancer) -> dict[str, Tensor]:
    """All that ``update`` moves."""
    bias = balancer.bias()
    return balancer.state() if bias is None else {"bias": bias, **balancer.state()}


def _with_tokens(load: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers that had any; all of them where none had."""
    return {name: counts for name, counts in load.items() if counts.any()} or load


def was_applied(optimizer: torch.optim.Optimizer) -> bool | Tensor:
    """Asked in a hook after a step: a GradScaler leaves with a fused optimizer whether a gradient is infinite, and the
    optimizer's kernel skips the step by it."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf == 0 if isinstance(found_inf, Tensor) else True


def _is_step_of_training(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook that asks was called by a step of the loop, and not by the ``super().step()`` in one, whose hooks
    torch calls too, or by the one with which torch makes an optimizer's state before it loads a checkpoint."""
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        # wrapper, or what Dynamo makes of the rest of it where a step is compiled
        is_step = frame.f_code.co_qualname.startswith("Optimizer.profile_hook_step.<locals>.")
        depth += is_step and frame.f_locals.get("self") is optimizer
        if frame.f_code.co_name == "_init_optim_state":
            return False
        frame = frame.f_back
    return depth == 1


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _allow_compile_over_checkpoint() -> None:
    """Lets a compiled graph hold our top-k mode inside an activation checkpoint.

    The mode is entered and left within a router's forward, but Dynamo sees a side effect of the checkpointed function
    and refuses unless side effects may be skipped in the recomputation. Skipping is right here: the mode is empty again
    when the forward ends.
    """
    import torch._dynamo

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
