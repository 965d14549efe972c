"""A tap: the place in somebody's model where one router is observed and steered.

A router's class is swapped for a subclass of the same name whose forward runs the family's own forward, steered by the
bias, and passes the weights through one opaque op:

    equipoise::tap            identity on the weights; counts the call, unless it runs inside a backward (recomputation)
    equipoise::tap_backward   reads the pooled load when the backward runs, returns the losses' gradient of the logits

Both find their state by a key at run time, so nothing differentiable leaves the layer and a compiled graph reads no
stale state. The key is a tensor: an integer would be a constant of the graph, and where layers are compiled one by one
every layer would need a graph of its own (the ninth is refused). The backward op takes the incoming gradient as an
argument: without it the compiler may move it into the forward, where the load is not known yet.
"""

import itertools
import weakref
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equipoise.errors import EquipoiseError
from equipoise.routers.forward import ForwardContext, is_traced
from equipoise.routing import score

__all__ = ["RECOMPUTED", "RouterKind", "Slot", "Tap", "UNCOUNTED", "tap_router", "untap_router"]

OWN_SLOT = "_equipoise_bias"  # the buffer of a router whose family has no slot of its own
UNCOUNTED = -1  # token of a call that does not count: evaluation, paused
RECOMPUTED = -2  # token of a call that was made again inside a backward


class RouterKind(NamedTuple):
    """How a router selects. ``attach`` finds it out, and proves it, by a probing forward.

    score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus``, which turns logits into scores.
    slot: the name of the float tensor that it adds for the choice, or None: a buffer or a frozen parameter of the
        router, of a module inside it (``"moe_statics.e_score_correction_bias"``), or of the module that holds the
        router and passes the tensor to it.
    selection: whether the choice is made by ``scores`` or by ``logits``, to which a bias is then added.
    gives: what its forward returns: ``logits``, which is (logits [tokens, experts], weights [tokens, k], expert_ids
        [tokens, k]) and perhaps more; the same with ``probabilities`` in place of the logits; or ``dense``, which is
        (scores [tokens, experts], 0 where not chosen; logits).

    A module of yours that has it as ``router_kind`` is known to ``attach``, whatever its class is called. It must have
    a ``weight`` [experts, dim] and return what ``gives`` says.
    """

    score_function: str
    slot: str | None = None
    selection: str = "scores"
    gives: str = "logits"

    def read(self, output: Any, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, weights, expert_ids) of what the router's forward returned; ``dense`` needs k."""
        if self.gives == "dense":
            dense, logits = output
            expert_ids = dense.detach().topk(k, dim=-1).indices
            return logits, dense.gather(-1, expert_ids), expert_ids
        first, weights, expert_ids = output[:3]
        if self.gives == "probabilities":
            first = first.clamp_min(torch.finfo(first.dtype).tiny).log()
        return first, weights, expert_ids

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        """``output`` with other weights of the same choice."""
        if self.gives == "dense":
            dense, logits = output
            return torch.zeros_like(dense).scatter(-1, expert_ids, weights), logits
        return (output[0], weights, *output[2:])

    def values(self, logits: Tensor) -> Tensor:
        """What a bias is added to."""
        return logits if self.selection == "logits" else score(logits, self.score_function)


class Slot(NamedTuple):
    """The tensor that steers a router, by the module that holds it and its name there."""

    holder: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor | None:
        """As it is held; None where it is not there."""
        held = self.holder._buffers.get(self.name)
        held = self.holder._parameters.get(self.name) if held is None else held
        if type(held).__name__ == "DTensor":
            raise EquipoiseError(
                f"the bias of a router must be a plain tensor: {self.name} of a {type(self.holder).__name__} is a "
                "DTensor. It is a parameter of this family; leave it out of fully_shard with ignored_params."
            )
        return None if held is None else held.detach()

    @property
    def bias(self) -> Float[Tensor, " experts"] | None:
        """The same, flat. Not a copy."""
        held = self.holder._buffers.get(self.name)
        if type(held) is Tensor and held.dim() == 1 and not held.requires_grad:
            return held  # by far the most frequent, and asked for at every step
        held = self.tensor
        return None if held is None else held.view(-1)

    def replace(self, bias: Float[Tensor, " experts"]) -> None:
        """Holds a copy of another dtype or on another device than the tensor that was there."""
        there = self.tensor
        copy = bias.detach().clone()
        copy = copy if there is None else copy.view(there.shape)
        if self.name in self.holder._parameters:
            self.holder._parameters[self.name].data = copy
        else:
            self.holder._buffers[self.name] = copy


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

    def restore_bias(self, layer: int) -> None: ...

    def adopt_bias(self, layer: int) -> None: ...


class Tap:
    """Ties one router to its observer. A copy of a router carries an inert tap: steered as it was, never counted."""

    def __init__(
        self, observer: Observer, context: ForwardContext, layer: int, kind: RouterKind, k: int, has_loss: bool
    ):
        number = next(_KEYS)
        self.key = torch.tensor(number, device="cpu")
        self.observer: Observer | None = observer
        self.context: ForwardContext | None = context
        self.layer = layer
        self.has_loss = has_loss
        self.steers = False  # by a slot of our own
        self.multiplies = False  # that slot is a factor 1 + bias
        self.kind = kind
        self.k = k
        _TAPS[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_tap, (self.kind, self.k, self.steers, self.multiplies)

    def restore(self) -> None:
        if self.observer is not None:
            self.observer.restore_bias(self.layer)

    def adopt(self) -> None:
        if self.observer is not None:
            self.observer.adopt_bias(self.layer)


def _inert_tap(kind: RouterKind, k: int, steers: bool, multiplies: bool) -> Tap:
    tap = Tap.__new__(Tap)
    tap.observer, tap.context, tap.layer, tap.has_loss = None, None, -1, False
    tap.kind, tap.k, tap.steers, tap.multiplies = kind, k, steers, multiplies
    return tap


_KEYS = itertools.count()
_TAPS: "weakref.WeakValueDictionary[int, Tap]" = weakref.WeakValueDictionary()


class BiasedTopK(TorchFunctionMode):
    """Steers a top-k over the experts: by argument + bias, or argument * (1 + bias). The values that come back are
    those of the argument as it was."""

    def __init__(self, bias: Float[Tensor, " experts"], multiplies: bool = False):
        super().__init__()
        self.bias, self.multiplies = bias, multiplies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_choice(func, args, self.bias):
            scores = args[0]
            plain = scores.detach()
            choice = plain * (1 + self.bias) if self.multiplies else plain + self.bias
            ids = torch.topk(choice, *args[1:], **(kwargs or {})).indices
            return torch.return_types.topk((scores.gather(-1, ids), ids))
        return func(*args, **(kwargs or {}))


def is_choice(func: Any, args: Any, bias: Float[Tensor, " experts"]) -> bool:
    """Whether a call is a top-k of tokens over the experts, and not one over groups of them."""
    if func not in (torch.topk, Tensor.topk) or not args:
        return False
    return args[0].dim() == 2 and args[0].shape[-1] == bias.shape[0]


@cache
def _tapped(base: Any) -> Any:
    def forward(self, *args, **kwargs):
        tap = self._equipoise
        if tap.steers:
            with BiasedTopK(self._buffers[OWN_SLOT], tap.multiplies):
                output = base.forward(self, *args, **kwargs)
        else:
            output = base.forward(self, *args, **kwargs)
        context = tap.context
        if context is None:  # a copy of the model
            return output
        logits, weights, expert_ids = tap.kind.read(output, tap.k)
        if type(logits).__name__ == "DTensor":
            raise EquipoiseError(
                f"a router must give plain tensors: {type(self).__name__} gives a DTensor. Leave it out of the plan of "
                "parallelize_module: every tensor parallel rank has the same tokens and routes them by itself."
            )
        rows = context.rows
        if rows == 0 and args and args[0].dim() == 3:
            rows = args[0].shape[0]
        if not tap.has_loss:
            logits = logits.detach()
        if is_traced():  # then it must be one opaque op
            # a compiler merges two calls with the same arguments; it takes no two empty tensors for the same
            call = torch.empty(0, device=weights.device) if torch.compiler.is_compiling() else None
            weights, _ = torch.ops.equipoise.tap(
                weights,
                logits,
                expert_ids,
                context.mask,
                context.sequence_ids,
                rows,
                tap.key,
                self.training,
                call,
            )
        elif tap.has_loss:
            weights = _EagerTap.apply(weights, logits, expert_ids, context, rows, tap, self.training)
        else:
            with torch.no_grad():
                _observe(tap, weights, logits, expert_ids, context.mask, context.sequence_ids, rows, self.training)
            return output
        return tap.kind.write(output, weights, expert_ids)

    return _subclass(base, {"forward": forward, **_follows_its_slot(base), "_equipoise_base": base}, _new_tapped)


@cache
def _holding(base: Any) -> Any:
    """A subclass of a module that holds the slot of a router, where that is not the router itself."""
    return _subclass(base, {**_follows_its_slot(base), "_equipoise_held": base}, _new_holding)


def _follows_its_slot(base: Any) -> dict[str, Any]:
    """What a module with a slot does besides: a cast leaves it in float32, and a checkpoint is taken up."""

    def _apply(self, fn, recurse=True):
        base._apply(self, fn, recurse)
        self._equipoise.restore()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        base._load_from_state_dict(self, *args, **kwargs)
        self._equipoise.adopt()

    return {"_apply": _apply, "_load_from_state_dict": _load_from_state_dict}


def _subclass(base: Any, namespace: dict[str, Any], new: Any) -> Any:
    def __reduce_ex__(self, protocol):
        return new, (base,), self.__dict__

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**namespace, **names, "__reduce_ex__": __reduce_ex__})


def _new_tapped(base: Any) -> nn.Module:
    cls = _tapped(base)
    return cls.__new__(cls)


def _new_holding(base: Any) -> nn.Module:
    cls = _holding(base)
    return cls.__new__(cls)


def plain_class(module: nn.Module) -> Any:
    """The class of a router as it was before it was tapped."""
    return getattr(type(module), "_equipoise_base", type(module))


def tap_router(router: nn.Module, tap: Tap, slot: Slot | None, own: Float[Tensor, " experts"] | None) -> None:
    """Swaps the class of ``router`` and of who holds its slot; with ``own`` it is steered by a buffer of ours, which no
    checkpoint sees."""
    if own is not None:
        router.register_buffer(OWN_SLOT, own, persistent=False)
        tap.steers = True
    router.__dict__["_equipoise"] = tap
    base: Any = type(router)
    router.__class__ = _tapped(base)
    if slot is not None and slot.holder is not router:
        slot.holder.__dict__["_equipoise"] = tap
        holder: Any = type(slot.holder)
        slot.holder.__class__ = _holding(holder)


def untap_router(router: nn.Module, slot: Slot | None) -> None:
    """Undoes ``tap_router``; a slot of the family's own keeps what it holds."""
    router.__class__ = type(router)._equipoise_base  # type: ignore[attr-defined]
    del router.__dict__["_equipoise"]
    if OWN_SLOT in router._buffers:
        delattr(router, OWN_SLOT)
    if slot is not None and "_equipoise_held" in vars(type(slot.holder)):
        slot.holder.__class__ = type(slot.holder)._equipoise_held  # type: ignore[attr-defined]
        del slot.holder.__dict__["_equipoise"]


def is_tapped(module: nn.Module) -> bool:
    """Whether ``module`` has a live tap. An inert one, on a copy of an attached model, is no tap."""
    tap = module.__dict__.get("_equipoise")
    return tap is not None and tap.observer is not None


# ---- the tap of a forward that runs as it is written ----


class _EagerTap(torch.autograd.Function):
    """What the ops below do, without their dispatch, which takes as long as counting."""

    @staticmethod
    def forward(ctx, weights, logits, expert_ids, context, rows, tap, training):
        ctx.tap, ctx.has_loss = tap, logits.requires_grad
        mask, sequence_ids = context.mask, context.sequence_ids
        ctx.token = _observe(tap, weights, logits, expert_ids, mask, sequence_ids, rows, training)
        if ctx.has_loss:  # what goes out is not kept: a model may write into that
            ctx.save_for_backward(logits, expert_ids, weights)
        return weights.clone()

    @staticmethod
    def backward(ctx, grad_weights):
        grad_logits = None
        if ctx.has_loss:
            grad_logits = _gradient(ctx.tap, ctx.token, *ctx.saved_tensors)
        return grad_weights, grad_logits, None, None, None, None, None


def _observe(tap, weights, logits, expert_ids, mask, sequence_ids, rows, training):
    """The call's token."""
    if tap is None or tap.observer is None:  # detached
        return UNCOUNTED
    return tap.observer.observe(tap.layer, weights, logits, expert_ids, mask, sequence_ids, rows, training)


def _gradient(tap, token, logits, expert_ids, weights):
    if tap is None or tap.observer is None:  # detached between forward and backward
        return torch.zeros_like(logits)
    return tap.observer.gradient(tap.layer, token, logits, expert_ids, weights)


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
    token = _observe(_TAPS.get(int(key)), weights, logits, expert_ids, mask, sequence_ids, int(rows), training)
    return weights.clone(), torch.tensor(token)


@torch.library.register_fake("equipoise::tap")
def _(weights, logits, expert_ids, mask, sequence_ids, rows, key, training, call):
    return torch.empty_like(weights), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.impl("equipoise::tap_backward", "CompositeExplicitAutograd")
def _tap_backward(grad_weights, logits, expert_ids, weights, token, key):
    return _gradient(_TAPS.get(int(key)), token.item(), logits, expert_ids, weights)


@torch.library.register_fake("equipoise::tap_backward")
def _(grad_weights, logits, expert_ids, weights, token, key):
    return torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    weights, logits, expert_ids, _, _, _, key, _, _ = inputs
    ctx.has_loss = logits.requires_grad
    if ctx.has_loss:
        ctx.save_for_backward(logits, expert_ids, weights, output[1], key)


def _backward(ctx, grad_weights, grad_token):
    grad_logits = None
    if ctx.has_loss:
        grad_logits = torch.ops.equipoise.tap_backward(grad_weights, *ctx.saved_tensors)
    return grad_weights, grad_logits, None, None, None, None, None, None, None


torch.library.register_autograd("equipoise::tap", _backward, setup_context=_setup_context)
