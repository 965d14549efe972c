"""A tap: the place in somebody's model where one router is observed and steered.

A router's class is swapped for a subclass of the same name whose forward runs the family's own forward, steered by the
offset, and passes the weights through one opaque op:

    equipoise::tap            identity on the weights; counts the call, unless it runs inside a backward (recomputation)
    equipoise::tap_backward   reads the pooled load when the backward runs, returns the losses' gradient of the logits

Both find their state by a key at run time, so nothing differentiable leaves the layer and a compiled graph reads no
stale state. The key is a tensor: an integer would be a constant of the graph, and where layers are compiled one by one
every layer would need a graph of its own (the ninth is refused). The backward op takes the incoming gradient as an
argument: without it the compiler may move it into the forward, where the load is not known yet.
"""

import itertools
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equipoise.errors import EquipoiseError

__all__ = ["ForwardContext", "RECOMPUTED", "RouterKind", "Tap", "UNCOUNTED", "tap_router", "untap_router"]

OWN_SLOT = "_equipoise_offset"  # the buffer of a router whose family has no slot of its own
UNCOUNTED = -1  # token of a call that does not count: evaluation, paused
RECOMPUTED = -2  # token of a call that was made again inside a backward


class RouterKind(NamedTuple):
    """What must be known of a router: its gate (``softmax``, ``sigmoid`` or ``sqrt_softplus``) and the name of the
    float buffer that it adds to the scores for the choice, or None. ``attach`` proves it by a probing forward.

    A module of yours that has it as ``router_kind`` is known to ``attach``. It must have a ``weight`` [experts, dim]
    and return (logits [tokens, experts], weights [tokens, k], expert_ids [tokens, k]).
    """

    gate: str
    slot: str | None


class Observer(Protocol):
    """What a tap reports to. ``Balance`` is the only one."""

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
    ) -> int: ...

    def gradient(
        self,
        layer: int,
        token: int,
        logits: Float[Tensor, "tokens experts"],
        expert_ids: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens experts"]: ...

    def restore_offset(self, layer: int) -> None: ...

    @property
    def num_calls(self) -> int: ...

    def forward_failed(self, num_calls: int) -> None: ...

    def adopt_offset(self, layer: int) -> None: ...


class ForwardContext:
    """What the attached module's forward was given: padding and rows. Its hooks set it before and clear it after.

    A copy of the model carries inert copies of the hooks, so it never writes into the original's context.
    """

    def __init__(self, model: nn.Module, observer: "Observer"):
        self.model = model
        self.observer = observer
        self.outer: list[tuple[Tensor | None, int]] = []  # by forward under way, mask and rows of the one around it
        self.num_calls = 0  # router calls before the outermost of them
        self.mask: Tensor | None = None
        self.sequence_ids: Tensor | None = None
        self.rows = 0
        self.given = False  # by Balance.token_mask: outranks what the forward was called with

    def clear(self) -> None:
        self.mask, self.sequence_ids, self.rows, self.given = None, None, 0, False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Puts aside what belongs to the open micro-batch; what is said meanwhile ends with it."""
        held = self.mask, self.sequence_ids, self.rows, self.given
        self.clear()
        try:
            yield
        finally:
            self.mask, self.sequence_ids, self.rows, self.given = held

    def before(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(names, args, strict=False))
        named.update(kwargs)
        if module is self.model:
            self.outer = []  # whatever a forward that was interrupted left
        if not self.outer and not torch.compiler.is_compiling():
            self.num_calls = self.observer.num_calls
        self.outer.append((None if self.given else self.mask, self.rows))
        rows = 0
        for name in ("input_ids", "inputs_embeds", *named):
            value = named.get(name)
            if isinstance(value, Tensor) and (value.dim() >= 3 or (value.dim() == 2 and not value.is_floating_point())):
                rows = value.shape[0]
                break
        self.rows = rows or self.rows
        mask = named.get("attention_mask")
        if not self.given and isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask = mask

    def after(self, names: list[str], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mask, self.rows = self.outer.pop() if self.outer else (None, 0)
        if not self.given:
            self.mask = mask
        if self.outer:
            return
        if output is None and not torch.compiler.is_compiling() and sys.exc_info()[1] is not None:
            self.observer.forward_failed(self.num_calls)


class Hook:
    """A method of a context as a module hook; a copy or a pickle of it does nothing."""

    def __init__(self, method: Any = None, names: list[str] | None = None):
        self.method, self.names = method, names

    def __call__(self, *args: Any) -> None:
        if self.method is not None:
            self.method(self.names, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class Tap:
    """Ties one router to its observer. A copy of a router carries an inert tap: steered as it was, never counted."""

    def __init__(self, observer: Observer, context: ForwardContext, layer: int, kind: RouterKind, has_loss: bool):
        number = next(_KEYS)
        self.key = torch.tensor(number, device="cpu")
        self.observer: Observer | None = observer
        self.context: ForwardContext | None = context
        self.layer = layer
        self.has_loss = has_loss
        self.steers = False  # by a slot of our own
        self.multiplies = False  # that slot is a factor 1 + offset
        self.kind = kind
        _TAPS[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_tap, (self.kind, self.steers, self.multiplies)

    def restore(self) -> None:
        if self.observer is not None:
            self.observer.restore_offset(self.layer)

    def adopt(self) -> None:
        if self.observer is not None:
            self.observer.adopt_offset(self.layer)


def _inert_tap(kind: RouterKind, steers: bool, multiplies: bool = False) -> Tap:
    tap = Tap.__new__(Tap)
    tap.observer, tap.context, tap.layer, tap.has_loss = None, None, -1, False
    tap.kind, tap.steers, tap.multiplies = kind, steers, multiplies
    return tap


_KEYS = itertools.count()
_TAPS: "weakref.WeakValueDictionary[int, Tap]" = weakref.WeakValueDictionary()


class OffsetTopK(TorchFunctionMode):
    """Steers a top-k over the experts: by argument + offset, or argument * (1 + offset). The values that come back are
    those of the argument as it was."""

    def __init__(self, offset: Float[Tensor, " experts"], multiplies: bool = False):
        super().__init__()
        self.offset, self.multiplies = offset, multiplies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, Tensor.topk) and args and args[0].shape[-1] == self.offset.shape[0]:
            scores = args[0]
            plain = scores.detach()
            choice = plain * (1 + self.offset) if self.multiplies else plain + self.offset
            ids = torch.topk(choice, *args[1:], **(kwargs or {})).indices
            return torch.return_types.topk((scores.gather(-1, ids), ids))
        return func(*args, **(kwargs or {}))


@cache
def _tapped(base: Any) -> Any:
    def forward(self, *args, **kwargs):
        tap = self._equipoise
        if tap.steers:
            with OffsetTopK(self._buffers[OWN_SLOT], tap.multiplies):
                output = base.forward(self, *args, **kwargs)
        else:
            output = base.forward(self, *args, **kwargs)
        context = tap.context
        if context is None:  # a copy of the model
            return output
        logits, weights, expert_ids = output
        if type(logits).__name__ == "DTensor":
            raise EquipoiseError(
                f"a router must give plain tensors: {type(self).__name__} gives a DTensor. Leave it out of the plan of "
                "parallelize_module: every tensor parallel rank has the same tokens and routes them by itself."
            )
        rows = context.rows
        if rows == 0 and args and args[0].dim() == 3:
            rows = args[0].shape[0]
        weights, _ = torch.ops.equipoise.tap(
            weights,
            logits if tap.has_loss else logits.detach(),
            expert_ids,
            context.mask,
            context.sequence_ids,
            rows,
            tap.key,
            self.training,
            # a compiler merges two calls with the same arguments; it takes no two empty tensors for the same
            torch.empty(0, device=weights.device) if torch.compiler.is_compiling() else None,
        )
        return logits, weights, expert_ids

    def _apply(self, fn, recurse=True):
        base._apply(self, fn, recurse)
        self._equipoise.restore()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        base._load_from_state_dict(self, *args, **kwargs)
        self._equipoise.adopt()

    def __reduce_ex__(self, protocol):
        return _new_tapped, (base,), self.__dict__

    namespace = {
        "forward": forward,
        "_apply": _apply,
        "_load_from_state_dict": _load_from_state_dict,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_equipoise_base": base,
    }
    return type(base.__name__, (base,), namespace)


def _new_tapped(base: Any) -> nn.Module:
    cls = _tapped(base)
    return cls.__new__(cls)


def tap_router(router: nn.Module, tap: Tap, own_slot: Float[Tensor, " experts"] | None) -> None:
    """Swaps the class of ``router``; with ``own_slot`` it is steered by a buffer of ours, which no checkpoint sees."""
    if own_slot is not None:
        router.register_buffer(OWN_SLOT, own_slot, persistent=False)
        tap.steers = True
    router.__dict__["_equipoise"] = tap
    base: Any = type(router)
    router.__class__ = _tapped(base)


def untap_router(router: nn.Module) -> None:
    """Undoes ``tap_router``; a slot of the family's own keeps what it holds."""
    router.__class__ = type(router)._equipoise_base  # type: ignore[attr-defined]
    del router.__dict__["_equipoise"]
    if OWN_SLOT in router._buffers:
        delattr(router, OWN_SLOT)


def is_tapped(module: nn.Module) -> bool:
    """Whether ``module`` has a live tap. An inert one, on a copy of an attached model, is no tap."""
    tap = module.__dict__.get("_equipoise")
    return tap is not None and tap.observer is not None


# ---- the two opaque ops ----

torch.library.define(
    "equipoise::tap",
    "(Tensor weights, Tensor logits, Tensor expert_ids, Tensor? mask, Tensor? sequence_ids, SymInt rows, Tensor key, "
    "bool training, Tensor? call) -> (Tensor, Tensor)",
)
torch.library.define(
    "equipoise::tap_backward",
    "(Tensor grad_weights, Tensor logits, Tensor expert_ids, Tensor weights, Tensor token, Tensor key) -> Tensor",
)


@torch.library.impl("equipoise::tap", "CompositeExplicitAutograd")
def _tap(weights, logits, expert_ids, mask, sequence_ids, rows, key, training, call):
    tap = _TAPS.get(int(key))
    token = UNCOUNTED
    if tap is not None and tap.observer is not None:
        token = tap.observer.observe(tap.layer, weights, logits, expert_ids, mask, sequence_ids, int(rows), training)
    return weights.clone(), torch.tensor(token)


@torch.library.register_fake("equipoise::tap")
def _(weights, logits, expert_ids, mask, sequence_ids, rows, key, training, call):
    return torch.empty_like(weights), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.impl("equipoise::tap_backward", "CompositeExplicitAutograd")
def _tap_backward(grad_weights, logits, expert_ids, weights, token, key):
    tap = _TAPS.get(int(key))
    if tap is None or tap.observer is None:  # detached between forward and backward
        return torch.zeros_like(logits)
    return tap.observer.gradient(tap.layer, token.item(), logits, expert_ids, weights)


@torch.library.register_fake("equipoise::tap_backward")
def _(grad_weights, logits, expert_ids, weights, token, key):
    return torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    _, logits, expert_ids, _, _, _, key, _, _ = inputs
    ctx.has_loss = logits.requires_grad
    if ctx.has_loss:
        ctx.save_for_backward(logits, expert_ids, *output, key)


def _backward(ctx, grad_weights, grad_token):
    grad_logits = None
    if ctx.has_loss:
        grad_logits = torch.ops.equipoise.tap_backward(grad_weights, *ctx.saved_tensors)
    return grad_weights, grad_logits, None, None, None, None, None, None, None


torch.library.register_autograd("equipoise::tap", _backward, setup_context=_setup_context)
