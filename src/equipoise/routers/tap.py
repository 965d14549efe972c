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

An eager forward does the same through a plain ``autograd.Function``: an operator's dispatch takes as long as counting.
"""

import itertools
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equipoise.errors import EquipoiseError
from equipoise.routers.forward import ForwardContext
from equipoise.routers.kind import ADDED_SLOT, MoELayer, RouterKind, Slot
from equipoise.torch_internals import is_traced

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
    is_training: bool = True


class Observer(Protocol):
    """What a tap reports to."""

    def observe(self, call: RouterCall) -> int: ...  # counts it; gives its id, which its backward brings back
    def gradient(self, call: RouterCall, call_id: int) -> Float[Tensor, "tokens experts"]: ...  # of the losses
    def restore_bias(self, layer: int) -> None: ...  # the slot was cast or moved: write the bias into it again
    def adopt_bias(self, layer: int) -> None: ...  # a checkpoint was loaded into the slot: take over what it holds


@dataclass(eq=False, repr=False)
class Tap:
    """Ties one router to its observer. A copy of the router carries an inert tap: steered as it was, never counted."""

    kind: RouterKind
    k: int
    layer: int = -1
    observer: Observer | None = None
    context: ForwardContext | None = None
    has_loss: bool = False
    uses_topk_mode: bool = False  # by BiasedTopK, with the buffer that attach added
    multiplies: bool = False  # the buffer holds w - 1; scores are multiplied by w
    dimensions: tuple[int, ...] = (2, 3)  # of the inputs that the router was proven on

    def __post_init__(self) -> None:
        if self.observer is not None:
            number = next(_KEYS)
            self.key = torch.tensor(number, device="cpu")
            _TAPS[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (self.kind, self.k, -1, None, None, False, self.uses_topk_mode, self.multiplies)

    def observe(self, call: RouterCall) -> int:
        return UNCOUNTED if self.observer is None else self.observer.observe(call)

    def gradient(self, call: RouterCall, call_id: int) -> Tensor:
        if self.observer is None:  # detached between forward and backward
            return torch.zeros_like(call.logits)
        return self.observer.gradient(call, call_id)


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


@cache
def _tapped_class(base: Any) -> Any:
    def forward(self, *args, **kwargs):
        tap = self._equipoise
        if tap.uses_topk_mode:
            top_k = BiasedTopK(self._buffers[ADDED_SLOT], tap.multiplies)
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
        context = tap.context
        if context is None:  # a copy of the model
            return output
        if len(tap.dimensions) == 1:
            _check_input(self, tap, *args, *kwargs.values())
        logits, weights, expert_ids = tap.kind.read(output, tap.k)
        if type(logits).__name__ == "DTensor":
            raise EquipoiseError(
                f"a router must give plain tensors: {type(self).__name__} gives a DTensor. Leave it out of the plan of "
                "parallelize_module: every tensor parallel rank has the same tokens and routes them by itself."
            )
        rows = context.rows or (args[0].shape[0] if args and args[0].dim() == 3 else 0)
        if not tap.has_loss:
            logits = logits.detach()
        if is_traced():
            # A compiler merges two calls with the same arguments. It takes no two empty tensors for the same.
            unique = torch.empty(0, device=weights.device) if torch.compiler.is_compiling() else None
            weights, _ = torch.ops.equipoise.tap(
                weights, logits, expert_ids, context.mask, context.sequence_ids, rows, tap.key, self.training, unique
            )
            return tap.kind.write(output, weights, expert_ids)
        mask, sequence_ids = context.mask, context.sequence_ids
        call = RouterCall(tap.layer, logits, expert_ids, weights, mask, sequence_ids, rows, self.training)
        if tap.has_loss:
            return tap.kind.write(output, _EagerTap.apply(weights, logits, expert_ids, call, tap), expert_ids)
        with torch.no_grad():
            tap.observe(call)
        return output

    return _subclass(base, _tapped_class, {"forward": forward, "_equipoise_base": base})


@cache
def _holding_class(base: Any) -> Any:
    """A subclass of a module that holds the slot of a router, if that is not the router itself."""
    return _subclass(base, _holding_class, {"_equipoise_held": base})


def _subclass(base: Any, class_of: Any, namespace: dict[str, Any]) -> Any:
    """Of a module with a slot: the bias survives a cast in float32, and a loaded checkpoint is adopted."""

    def _apply(self, fn, recurse=True):
        base._apply(self, fn, recurse)
        tap = self._equipoise
        if tap.observer is not None:
            tap.observer.restore_bias(tap.layer)
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        base._load_from_state_dict(self, *args, **kwargs)
        tap = self._equipoise
        if tap.observer is not None:
            tap.observer.adopt_bias(tap.layer)

    def __reduce_ex__(self, protocol):
        return _new, (class_of, base), self.__dict__

    follows_its_slot = {"_apply": _apply, "_load_from_state_dict": _load_from_state_dict}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**namespace, **follows_its_slot, **names, "__reduce_ex__": __reduce_ex__})


def _new(class_of: Any, base: Any) -> nn.Module:
    cls = class_of(base)
    return cls.__new__(cls)


def plain_class(module: nn.Module) -> Any:
    """The class that a router had before it was tapped."""
    return getattr(type(module), "_equipoise_base", type(module))


def tap_router(layer: MoELayer, tap: Tap, added_slot: Float[Tensor, " experts"] | None) -> None:
    """Swaps the class of the router and of its slot's holder. ``added_slot`` becomes a buffer no checkpoint sees."""
    router, slot = layer.router, layer.slot
    tap.dimensions = layer.dimensions
    if added_slot is not None:
        router.register_buffer(ADDED_SLOT, added_slot, persistent=False)
        tap.uses_topk_mode = True
    router.__dict__["_equipoise"] = tap
    base: Any = type(router)
    router.__class__ = _tapped_class(base)
    if slot is not None and slot.holder is not router:
        slot.holder.__dict__["_equipoise"] = tap
        holder: Any = type(slot.holder)
        slot.holder.__class__ = _holding_class(holder)


def untap_router(router: nn.Module, slot: Slot | None) -> None:
    """Undoes ``tap_router``. The model's own slot keeps what it holds."""
    router.__class__ = type(router)._equipoise_base  # type: ignore[attr-defined]
    del router.__dict__["_equipoise"]
    if ADDED_SLOT in router._buffers:
        delattr(router, ADDED_SLOT)
    if slot is not None and "_equipoise_held" in vars(type(slot.holder)):
        slot.holder.__class__ = type(slot.holder)._equipoise_held  # type: ignore[attr-defined]
        del slot.holder.__dict__["_equipoise"]


def tap_of(router: nn.Module) -> Tap | None:
    """The tap of a router, live or inert."""
    return router.__dict__.get("_equipoise")


def has_live_tap(router: nn.Module) -> bool:
    """Whether a router is attached. A copy of an attached router has an inert tap, and is not."""
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

torch.library.define(
    "equipoise::tap",
    "(Tensor weights, Tensor logits, Tensor expert_ids, Tensor? mask, Tensor? sequence_ids, SymInt rows, Tensor key, "
    "bool training, Tensor? unique) -> (Tensor, Tensor)",
)
torch.library.define(
    "equipoise::tap_backward",
    "(Tensor grad_weights, Tensor logits, Tensor expert_ids, Tensor weights, Tensor call_id, Tensor key) -> Tensor",
)


@torch.library.impl("equipoise::tap", "CompositeExplicitAutograd")
def _tap(weights, logits, expert_ids, mask, sequence_ids, rows, key, training, unique):
    tap, call_id = _TAPS.get(int(key)), UNCOUNTED
    if tap is not None:
        call = RouterCall(tap.layer, logits, expert_ids, weights, mask, sequence_ids, int(rows), training)
        call_id = tap.observe(call)
    return weights.clone(), torch.tensor(call_id)


@torch.library.register_fake("equipoise::tap")
def _(weights, logits, expert_ids, mask, sequence_ids, rows, key, training, unique):
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
    weights, logits, expert_ids, _, _, _, key, _, _ = inputs
    ctx.needs_gradient = logits.requires_grad
    if ctx.needs_gradient:
        ctx.save_for_backward(logits, expert_ids, weights, output[1], key)


def _backward(ctx, grad_weights, grad_token):
    grad_logits = torch.ops.equipoise.tap_backward(grad_weights, *ctx.saved_tensors) if ctx.needs_gradient else None
    return grad_weights, grad_logits, None, None, None, None, None, None, None


torch.library.register_autograd("equipoise::tap", _backward, setup_context=_setup_context)
