"""A tap: the place in a model where one router is observed and steered.

``attach`` swaps the class of a router for a subclass of the same name. Its forward runs the router's own forward,
steered by the bias, and reports the call. If a loss has a gradient at the router, it also passes the weights through
one opaque operator:

    equipoise::tap            identity on the weights; counts the call, unless it runs inside a backward (recomputation)
    equipoise::tap_backward   when the backward runs: returns the gradient of the losses at the logits

Both find their tap by a key at run time, so nothing differentiable leaves the layer and a compiled graph reads no stale
state. The key is a tensor. An integer would be a constant of the graph: layers compiled one by one would each need a
graph of their own, and Dynamo refuses the ninth. The backward operator takes the incoming gradient as an argument.
Without it the compiler may move the operator into the forward, where the pooled load is not known yet.

An eager forward does the same without these operators, whose dispatch takes as long as counting. If autograd keeps the
scores of the call, a hook adds the gradient at the scores: their own backward is the rest of the formula, and nothing
else is kept. Otherwise (activation checkpointing, offloading) a plain ``autograd.Function`` does what the operators do.
"""

import itertools
import weakref
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equipoise.errors import EquipoiseError
from equipoise.routers.forward import ForwardContext
from equipoise.routers.kind import ADDED_SLOT, MoELayer, RouterKind, Slot
from equipoise.torch_internals import (
    are_gradients_wanted,
    is_traced,
    leading_dimensions,
    node_of_scores,
    running_node,
    saved_scores,
)

UNCOUNTED = -1  # id of a call that does not count: evaluation, paused
RECOMPUTED = -2  # id of a call that a backward makes again


class RouterCall(NamedTuple):
    """One call of a router, as its tap saw it."""

    layer: int
    logits: Float[Tensor, "tokens experts"]
    expert_ids: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]
    mask: Tensor | None = None  # of the model's forward, not yet fitted to these tokens
    sequence_ids: Tensor | None = None
    rows: int = 0  # of the batch; 0 if unknown
    length: int = 0  # tokens of a row of the batch; 0 if unknown
    leading: tuple[int, ...] = ()  # of the router's input, the dimensions before the last; () if it was flattened
    is_training: bool = True
    has_gradient: bool = True  # gradients were on when the forward of the model began, and are wanted now
    is_compiled: bool = False  # in a graph, where the context is not kept
    scores: Float[Tensor, "tokens experts"] | None = None  # that the router made of the logits, if they were seen
    keeps_scores: bool = False  # autograd has them, so it will not make the call again

    @property
    def num_tokens(self) -> int:
        return self.expert_ids.shape[0]


class Observer(Protocol):
    """What a tap reports to."""

    def observe(self, call: RouterCall) -> int: ...  # counts it; gives its id, which its backward brings back
    def gradient(self, call: RouterCall, call_id: int) -> Float[Tensor, "tokens experts"]: ...  # of the losses
    def add_score_gradient(self, call: RouterCall, call_id: int, onto: Tensor) -> Tensor: ...  # of the losses
    def note_detached_logits(self, layer: int) -> None: ...  # no loss reaches the router through them
    def restore_bias(self, layer: int) -> None: ...  # the slot was cast or moved: write the bias into it again
    def adopt_bias(self, layer: int) -> None: ...  # a checkpoint was loaded into the slot: take over what it holds


@dataclass(eq=False, repr=False)
class Tap:
    """Ties one router to its observer. A copy of the router is steered as it was, and never counted.

    A deep copy or a pickle carries an inert tap. A shallow copy carries this one, which is the tap of ``router`` only.
    """

    kind: RouterKind
    k: int
    layer: int = -1
    observer: Observer | None = None
    context: ForwardContext | None = None
    has_loss: bool = False
    has_slopes: bool = False  # all losses have: their gradient is known at the scores
    reads_scores: bool = False  # what is counted depends on the scores
    multiplies: bool = False  # the buffer that attach added holds w - 1; scores are multiplied by w
    router: nn.Module | None = field(default=None, init=False)  # the one whose calls it reports
    dimensions: tuple[int, ...] = (2, 3)  # of the inputs that the router was proven on

    def __post_init__(self) -> None:
        if self.observer is not None:
            number = next(_KEYS)
            self.key = torch.tensor(number, device="cpu")
            _TAPS[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (self.kind, self.k, -1, None, None, False, False, False, self.multiplies)

    def observe(self, call: RouterCall) -> int:
        return UNCOUNTED if self.observer is None else self.observer.observe(call)

    def gradient(self, call: RouterCall, call_id: int) -> Tensor:
        if self.observer is None:  # detached between forward and backward
            return torch.zeros_like(call.logits)
        return self.observer.gradient(call, call_id)

    def add_score_gradient(self, call: RouterCall, call_id: int, onto: Tensor) -> Tensor:
        return onto if self.observer is None else self.observer.add_score_gradient(call, call_id, onto)


_KEYS = itertools.count()
_TAPS: "weakref.WeakValueDictionary[int, Tap]" = weakref.WeakValueDictionary()


class BiasedTopK(TorchFunctionMode):
    """Steers a top-k over the experts, by argument + bias or argument * (1 + bias); it gives the argument's values."""

    def __init__(self, bias: Float[Tensor, " experts"], multiplies: bool = False):
        super().__init__()
        self.bias, self.multiplies = bias, multiplies
        self._dimensions: list[int] = []  # of the arguments that were steered

    @property
    def num_choices(self) -> int:
        """How many choices of experts were steered.

        A top-k of more dimensions beside the choice ranks the experts inside a single expert group: [tokens, 1,
        experts]. A bias on it chooses nothing.
        """
        return self._dimensions.count(min(self._dimensions)) if self._dimensions else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk) and kwargs.get("out") is None:
            scores, k, is_sorted = _topk_of_experts(self.bias.shape[0], *args, **kwargs)
            if scores is not None:
                self._dimensions.append(scores.dim())
                plain = scores.detach()
                choice = plain * (1 + self.bias) if self.multiplies else plain + self.bias
                ids = torch.topk(choice, k, sorted=is_sorted).indices
                return torch.return_types.topk((scores.gather(-1, ids), ids))
        return func(*args, **kwargs)


def _topk_of_experts(
    num_experts: int, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, out: Any = None
) -> tuple[Tensor | None, int, bool]:
    """The scores, k and ``sorted`` of a call of ``torch.topk``; no scores if it ranks anything but the experts."""
    is_last = input.dim() >= 2 and dim in (-1, input.dim() - 1)
    ranks_experts = is_last and largest and input.shape[-1] == num_experts  # expert groups are fewer
    return input if ranks_experts else None, k, sorted


def _check_input(router: nn.Module, tap: Tap, hidden: Tensor, *others: Any) -> None:
    """Raises for an input of another form than the one on which the router was proven."""
    if min(hidden.dim(), 3) not in tap.dimensions:
        forms = {2: "[tokens, dim]", 3: "[batch, sequence, dim]"}
        raise EquipoiseError(
            f"a {type(router).__name__} must be called with {forms[tap.dimensions[0]]}: got the shape "
            f"{tuple(hidden.shape)}, on which it chooses otherwise than by its scores. Reshape what it is called with."
        )


def _report(router: nn.Module, tap: Tap, output: Any, hidden: Any) -> Any:
    """Reports a call of ``router`` on ``hidden``. The output, behind the tap if there is a loss."""
    kind, context = tap.kind, tap.context
    assert context is not None  # the tap is live
    logits, weights, expert_ids = kind.read(output, tap.k)
    if type(logits).__name__ == "DTensor":
        raise EquipoiseError(
            f"a router must give plain tensors: {type(router).__name__} gives a DTensor. Leave it out of the plan of "
            "parallelize_module: every tensor parallel rank has the same tokens and routes them by itself."
        )
    mask, sequence_ids = context.mask_and_sequences()
    forward = (mask, sequence_ids, context.inputs.rows, context.inputs.length)
    has_gradient = context.has_gradient is not False and are_gradients_wanted()
    if is_traced():
        shape = list(hidden.shape[:-1]) if isinstance(hidden, Tensor) and hidden.dim() == 3 else []
        # A compiler merges two calls with the same arguments. It takes no two empty tensors for the same.
        unique = torch.empty(0, device=weights.device) if torch.compiler.is_compiling() else None
        modes = (router.training, has_gradient, unique)
        logits = logits if tap.has_loss else logits.detach()
        weights, _ = torch.ops.equipoise.tap(weights, logits, expert_ids, *forward, shape, tap.key, *modes)
        return kind.write(output, weights, expert_ids)
    is_detached = tap.has_loss and not logits.requires_grad and torch.is_grad_enabled()
    if is_detached and tap.observer is not None and any(p.requires_grad for p in router.parameters()):
        tap.observer.note_detached_logits(tap.layer)
    leading = leading_dimensions(hidden) if context.uses_places else ()
    call = RouterCall(tap.layer, logits, expert_ids, weights, *forward, leading, router.training, has_gradient)
    needs_gradient = tap.has_loss and logits.requires_grad
    scores = node_of_scores(weights, logits, kind.score_function) if tap.reads_scores else None
    if scores is not None:
        call = call._replace(scores=saved_scores(scores, logits).detach(), keeps_scores=tap.has_slopes)
    if needs_gradient and not call.keeps_scores:
        return kind.write(output, _EagerTap.apply(weights, logits, expert_ids, call, tap), expert_ids)
    with torch.no_grad():
        call_id = tap.observe(call)
    if needs_gradient and scores is not None:
        scores.register_prehook(_AtScores(tap, expert_ids, call_id))
    return output


class _AtScores:
    """Adds the gradient of the losses to that of the scores, before the backward goes on to the logits."""

    def __init__(self, tap: Tap, expert_ids: Tensor, call_id: int):
        self.tap, self.expert_ids, self.call_id = tap, expert_ids, call_id

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if gradient is None:
            return gradients
        by_token = gradient.reshape(-1, gradient.shape[-1])
        scores = saved_scores(running_node(), by_token)
        call = RouterCall(self.tap.layer, scores, self.expert_ids, scores, scores=scores)
        return (self.tap.add_score_gradient(call, self.call_id, by_token).reshape(gradient.shape),)


@cache
def _tapped_class(base: Any) -> Any:
    def forward(self, *args, **kwargs):
        tap = getattr(self, "_equipoise", None)
        added_slot = None if tap is None else self._buffers.get(ADDED_SLOT)
        if added_slot is not None:
            top_k = BiasedTopK(added_slot, tap.multiplies)
            with top_k:
                output = base.forward(self, *args, **kwargs)
            if top_k.num_choices != 1:
                raise EquipoiseError(
                    "a router without a bias of its own must choose by one torch.topk over its experts, as it did when "
                    f"it was attached: in this call {type(self).__name__} took {top_k.num_choices}, so no bias steers "
                    "it. Call detach() before a router is changed, and attach again after."
                )
        else:
            output = base.forward(self, *args, **kwargs)
        if tap is None or tap.router is None:  # detached, or a deep copy
            return output
        if tap.router is not self:
            id(self)  # Dynamo guards the graph of a shallow copy by this: it would serve the router too, uncounted
            return output
        if len(tap.dimensions) == 1:
            _check_input(self, tap, *args, *kwargs.values())
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        return _report(self, tap, output, hidden)

    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]  # for inspect.signature
    return _subclass(base, _tapped_class, {"forward": forward})


@cache
def _holding_class(base: Any) -> Any:
    """A subclass of a module that holds the slot of a router, if that is not the router itself."""
    return _subclass(base, _holding_class, {})


def _subclass(base: Any, class_of: Any, namespace: dict[str, Any]) -> Any:
    """Of a module with a slot: the bias survives a cast in float32, and a loaded checkpoint is adopted."""

    def _apply(self, fn, recurse=True):
        base._apply(self, fn, recurse)
        for tap in _live_taps(self):
            tap.observer.restore_bias(tap.layer)
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        base._load_from_state_dict(self, *args, **kwargs)
        for tap in _live_taps(self):
            tap.observer.adopt_bias(tap.layer)

    def __reduce_ex__(self, protocol):
        if type(self) is not subclass:  # one that was put on top, which knows how to copy itself
            return base.__reduce_ex__(self, protocol)
        return _new, (class_of, base), self.__getstate__()

    follows_its_slot = {"_apply": _apply, "_load_from_state_dict": _load_from_state_dict}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    namespace = {**namespace, **follows_its_slot, **names, "__reduce_ex__": __reduce_ex__}
    subclass: Any = type(base.__name__, (base,), {**namespace, "_equipoise_base": base, _mark(class_of): True})
    return subclass


def _live_taps(module: nn.Module) -> list[Any]:
    """The taps whose slot a module holds: its own, or those of routers around it or inside it."""
    tap = module.__dict__.get("_equipoise")
    taps = (() if tap is None else (tap,)) + module.__dict__.get("_equipoise_held", ())
    return [tap for tap in taps if tap.observer is not None]


def _new(class_of: Any, base: Any) -> nn.Module:
    cls = class_of(base)
    return cls.__new__(cls)


def plain_class(module: nn.Module) -> Any:
    """The class that a module had before it was tapped. A tapped class below one that was put on later stays."""
    cls: Any = type(module)
    while "_equipoise_base" in vars(cls):
        cls = cls._equipoise_base
    return cls


def is_tapped(router_class: type) -> bool:
    """Whether a class of routers is, or is derived from, one that reports to a tap."""
    return _has_layer(router_class, _tapped_class)


def _has_layer(cls: type, class_of: Any) -> bool:
    return hasattr(cls, _mark(class_of))


def _mark(class_of: Any) -> str:
    """The attribute by which a class and its subclasses show that they are made of ours."""
    return "_equipoise" + class_of.__name__


def _put_on(module: nn.Module, class_of: Any) -> None:
    """Swaps the class for our subclass, unless one from an earlier attach is below a class that others put on."""
    if not _has_layer(type(module), class_of):
        module.__class__ = class_of(type(module))


def _take_off(module: nn.Module) -> None:
    """Swaps our class back. One below a class that others put on stays, and does nothing without a tap."""
    if not module.__dict__.keys() & {"_equipoise", "_equipoise_held"}:
        module.__class__ = plain_class(module)


def tap_router(layer: MoELayer, tap: Tap, added_slot: Float[Tensor, " experts"] | None) -> None:
    """Swaps the class of the router and of its slot's holder. ``added_slot`` becomes a buffer no checkpoint sees."""
    router, slot = layer.router, layer.slot
    tap.dimensions = layer.dimensions
    if added_slot is not None:
        router.register_buffer(ADDED_SLOT, added_slot, persistent=False)
    tap.router = router
    router.__dict__["_equipoise"] = tap
    _put_on(router, _tapped_class)
    if slot is not None and slot.holder is not router:
        holder = slot.holder
        holder.__dict__["_equipoise_held"] = (*holder.__dict__.get("_equipoise_held", ()), tap)
        _put_on(holder, _holding_class)


def untap_router(router: nn.Module, slot: Slot | None) -> None:
    """Undoes ``tap_router``, and no more: what others put on the router since stays.

    The model's own slot keeps what it holds.
    """
    tap = router.__dict__.pop("_equipoise")
    if ADDED_SLOT in router._buffers:
        delattr(router, ADDED_SLOT)
    _take_off(router)
    if slot is not None and "_equipoise_held" in slot.holder.__dict__:
        holder = slot.holder
        others = tuple(other for other in holder.__dict__.pop("_equipoise_held") if other is not tap)
        if others:
            holder.__dict__["_equipoise_held"] = others
        _take_off(holder)


def tap_of(router: nn.Module) -> Tap | None:
    """The tap of a router, live or inert."""
    return router.__dict__.get("_equipoise")


def has_live_tap(router: nn.Module) -> bool:
    """Whether a router is attached, or is a shallow copy of one, with which it shares its tensors."""
    tap = tap_of(router)
    return tap is not None and tap.observer is not None


class _EagerTap(torch.autograd.Function):
    """What the operators below do, without their dispatch."""

    @staticmethod
    def forward(ctx, weights, logits, expert_ids, call, tap):
        ctx.tap, ctx.needs_gradient = tap, logits.requires_grad
        ctx.call_id = tap.observe(call)
        if ctx.needs_gradient:  # the returned clone is not saved: the model may write into it
            ctx.save_for_backward(logits, expert_ids, weights)
        return weights.clone()

    @staticmethod
    def backward(ctx, grad_weights):
        grad_logits = None
        if ctx.needs_gradient:
            grad_logits = ctx.tap.gradient(RouterCall(ctx.tap.layer, *ctx.saved_tensors), ctx.call_id)
        return grad_weights, grad_logits, None, None, None


# ---- the two opaque operators ----
# They run Python, so no CUDA graph may hold them: a replay would leave it out.

torch.library.define(
    "equipoise::tap",
    "(Tensor weights, Tensor logits, Tensor expert_ids, Tensor? mask, Tensor? sequence_ids, SymInt rows, "
    "SymInt length, SymInt[] leading, Tensor key, bool training, bool has_gradient, Tensor? unique) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
torch.library.define(
    "equipoise::tap_backward",
    "(Tensor grad_weights, Tensor logits, Tensor expert_ids, Tensor weights, Tensor call_id, Tensor key) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl("equipoise::tap", "CompositeExplicitAutograd")
def _tap(weights, logits, expert_ids, mask, sequence_ids, rows, length, leading, key, training, has_gradient, unique):
    tap, call_id = _TAPS.get(int(key)), UNCOUNTED
    if tap is not None:
        forward = (mask, sequence_ids, int(rows), int(length), tuple(map(int, leading)))
        modes = (training, has_gradient, unique is not None)
        call_id = tap.observe(RouterCall(tap.layer, logits, expert_ids, weights, *forward, *modes))
    return weights.clone(), torch.tensor(call_id)


@torch.library.register_fake("equipoise::tap")
def _(weights, *_):
    return torch.empty_like(weights), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.impl("equipoise::tap_backward", "CompositeExplicitAutograd")
def _tap_backward(grad_weights, logits, expert_ids, weights, call_id, key):
    tap = _TAPS.get(int(key))
    if tap is None:  # its Balance is gone
        return torch.zeros_like(logits)
    return tap.gradient(RouterCall(tap.layer, logits, expert_ids, weights), call_id.item())


@torch.library.register_fake("equipoise::tap_backward")
def _(grad_weights, logits, expert_ids, weights, call_id, key):
    return torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    weights, logits, expert_ids, *_, key, _, _, _ = inputs
    ctx.needs_gradient = logits.requires_grad
    if ctx.needs_gradient:
        ctx.save_for_backward(logits, expert_ids, weights, output[1], key)


def _backward(ctx, grad_weights, grad_token):
    grad_logits = torch.ops.equipoise.tap_backward(grad_weights, *ctx.saved_tensors) if ctx.needs_gradient else None
    return grad_weights, grad_logits, *[None] * 10


torch.library.register_autograd("equipoise::tap", _backward, setup_context=_setup_context)
