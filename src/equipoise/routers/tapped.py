"""Puts taps on routers, and takes them off.

A tapped router has a subclass of its class, of the same name. Its forward runs the router's own forward, steered by the
bias, and reports the call. If a loss has a gradient at the router, it also prepares the way of that gradient.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import RouterAdapter
from equipoise.routers.arguments import argument_names
from equipoise.routers.blocks import BlockAdapter
from equipoise.routers.gradient_paths import AtScores, EagerTap
from equipoise.routers.kind import ADDED_SLOT, MoELayer, Slot
from equipoise.routers.logits import hook_keeping_logits, methods_keeping_logits, take_logits
from equipoise.routers.steering import BiasedTopK, ChoicesSeen
from equipoise.routers.tap import RouterCall, Tap
from equipoise.torch_internals import (
    are_gradients_wanted,
    is_traced,
    leading_dimensions,
    node_of_scores,
    outside_graphs,
    saved_scores,
)


def _check_input(router: nn.Module, tap: Tap, hidden: Tensor, *others: Any) -> None:
    """Raises for an input of another form than the one on which the router was proven."""
    if min(hidden.dim(), 3) not in tap.dimensions:
        forms = {2: "[tokens, dim]", 3: "[batch, sequence, dim]"}
        raise EquipoiseError(
            f"a {type(router).__name__} must be called with {forms[tap.dimensions[0]]}: got the shape "
            f"{tuple(hidden.shape)}, on which it chooses otherwise than by its scores. Reshape what it is called with."
        )


def _report(
    router: nn.Module, tap: Tap, output: Any, logits: Any, args: Any, kwargs: Any, chosen: Tensor | None = None
) -> Any:
    """Reports a call of ``router``. The output, behind the tap if there is a loss.

    ``logits`` and ``chosen`` are those that an adapter takes from inside the forward, else None.
    """
    kind, context = tap.kind, tap.context
    assert context is not None  # the tap is live
    logits, weights, expert_ids = kind.read(output if chosen is None else (output, chosen), tap.k, logits)
    if type(logits).__name__ == "DTensor":
        raise EquipoiseError(
            f"a router must give plain tensors: {type(router).__name__} gives a DTensor. Leave it out of the plan of "
            "parallelize_module: every tensor parallel rank has the same tokens and routes them by itself."
        )
    mask, sequence_ids = context.mask_and_sequences()
    hidden = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(kind.gives, str) and not context.has_explicit_mask:
        arguments = dict(zip(tap.argument_names, args, strict=False)) | kwargs | {"self": router}
        own_mask = kind.gives.mask(arguments)
        mask = mask if own_mask is None else own_mask
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
    leading = leading_dimensions(hidden) if context.uses_places or context.reads_order else ()
    call = RouterCall(tap.layer, logits, expert_ids, weights, *forward, leading, router.training, has_gradient)
    needs_gradient = tap.has_loss and logits.requires_grad
    scores = node_of_scores(weights, logits, kind.score_function) if tap.reads_scores else None
    if scores is not None:
        call = call._replace(scores=saved_scores(scores, logits).detach(), keeps_scores=tap.has_slopes)
    if needs_gradient and not call.keeps_scores:
        return kind.write(output, EagerTap.apply(weights, logits, expert_ids, call, tap), expert_ids)
    with torch.no_grad():
        call_id = tap.observe(call)
    if needs_gradient and scores is not None:
        scores.register_prehook(AtScores(tap, expert_ids, call_id))
    return output


def _forward_of_block(block: nn.Module, base: Any, tap: Tap, args: Any, kwargs: Any) -> Any:
    """The forward of a block that routes by itself. Its call is reported when its top-k chooses."""

    def report(values: Tensor, expert_ids: Tensor) -> Tensor:
        logits = take_logits(block)
        if tap.router is not block:  # detached, or a copy
            return values
        if len(tap.dimensions) == 1:
            _check_input(block, tap, *args, *kwargs.values())
        reported: Tensor = _report(block, tap, (values, expert_ids), logits, args, kwargs)[0]
        return reported

    bias = block._buffers.get(ADDED_SLOT)
    recorded = _ids_to_replay(block, tap, args, kwargs)
    top_k = BiasedTopK(bias, tap.multiplies, tap.chooses_by_max, tap.num_experts, report, recorded)
    with top_k:
        output = base.forward(block, *args, **kwargs)
    if top_k.num_choices != 1:
        raise EquipoiseError(
            "a block that routes by itself must choose by one top-k over its experts, as it did when it was attached: "
            f"in this call {type(block).__name__} took {top_k.num_choices}, so its choice was not counted. Call "
            "detach() before a block is changed, and attach again after."
        )
    if recorded is not None:
        _check_replayed(block, tap, top_k, recorded)
    return output


def _forward_seen(router: nn.Module, base: Any, seen: ChoicesSeen | None, args: Any, kwargs: Any) -> Any:
    """The forward of a router. Its choice is kept in ``seen`` as it is steered, if that is not None."""
    if seen is None:
        return base.forward(router, *args, **kwargs)
    with seen:
        return base.forward(router, *args, **kwargs)


def _report_seen(router: nn.Module, tap: Any, output: Any, seen: ChoicesSeen, args: Any, kwargs: Any) -> Any:
    """Reports a call of a router whose output does not show its choice."""
    if len(tap.dimensions) == 1:
        _check_input(router, tap, *args, *kwargs.values())
    ids = seen.expert_ids
    if len(seen.logits) != 1 or ids is None or ids.shape[-1] != tap.k:
        raise EquipoiseError(
            f"a router must take one softmax and choose {tap.k} experts per token, as it did when it was attached: in "
            f"this call {type(router).__name__} took {len(seen.logits)} softmax, {len(seen.top_k)} top-k and "
            f"{len(seen.maxima)} maxima over its experts. Call detach() before a router is changed, and attach after."
        )
    return _report(router, tap, output, seen.logits[0], args, kwargs, ids)


def _ids_to_replay(router: nn.Module, tap: Tap, args: Any, kwargs: Any) -> Int[Tensor, "tokens k"] | None:
    """The ids of the record that is replayed, in the order of the router's tokens; None if it chooses by itself."""
    ids = tap.ids_to_replay
    if ids is None or tap.router is not router or ids.dim() == 2:
        return ids if tap.router is router else None
    hidden = args[0] if args else next(iter(kwargs.values()), None)
    if not is_traced():
        leading = leading_dimensions(hidden)
    else:
        leading = tuple(hidden.shape[:-1]) if isinstance(hidden, Tensor) and hidden.dim() == 3 else ()
    rows, length = ids.shape[:2]
    is_turned = len(leading) == 2 and rows != length and leading[0] == length and leading[1] == rows
    if tap.kind.adapter.is_sequence_first or is_turned:
        ids = ids.transpose(0, 1)
    return ids.reshape(-1, ids.shape[-1])


def _check_replayed(router: nn.Module, tap: Tap, top_k: BiasedTopK, recorded: Tensor) -> None:
    """Raises if the record did not make the router's one choice."""
    name, (num_tokens, k) = type(router).__name__, tuple(recorded.shape)
    if top_k.num_choices != 1 or (tap.has_groups and top_k.num_group_choices != 1):
        groups = f", and {top_k.num_group_choices} over its expert groups" if tap.has_groups else ""
        raise EquipoiseError(
            "a router must choose by one torch.topk over its experts, and one over its groups if it has any, to be "
            f"replayed: in this call {name} took {top_k.num_choices} over its experts{groups}. A fused kernel is none: "
            "switch it off, or give this layer None in replay(): it is then routed live."
        )
    if top_k.num_replayed != 1:
        raise EquipoiseError(
            f"a record must have {k} ids for each token that a router is called with: {name} was called with other "
            f"tokens than the {num_tokens} of the record. Give the ids of this forward's tokens, padding included, of "
            "this rank. A block that is computed in parts cannot be replayed: give its layer None."
        )


@cache
def _tapped_class(base: Any, adapter: RouterAdapter | None = None) -> Any:
    """A subclass of a router that reports its calls. ``adapter``: one that takes logits from a method of the router."""
    is_block = isinstance(adapter, BlockAdapter)
    hides_choice = adapter is not None and adapter.choice_is_hidden

    def forward(self, *args, **kwargs):
        tap = getattr(self, "_equipoise", None)
        if is_block and tap is not None:
            return _forward_of_block(self, base, tap, args, kwargs)
        added_slot = None if tap is None else self._buffers.get(ADDED_SLOT)
        recorded = None if tap is None else _ids_to_replay(self, tap, args, kwargs)
        seen = ChoicesSeen(tap.num_experts) if hides_choice and tap is not None and tap.router is self else None
        if added_slot is not None or recorded is not None:
            assert tap is not None
            modes = (tap.multiplies, tap.chooses_by_max, tap.num_experts)
            num_maxima = tap.k if tap.chooses_by_max else 1
            top_k = BiasedTopK(added_slot, *modes, recorded=recorded, has_groups=tap.has_groups, num_maxima=num_maxima)
            with top_k:
                output = _forward_seen(self, base, seen, args, kwargs)
            if recorded is not None:
                _check_replayed(self, tap, top_k, recorded)
            elif top_k.num_choices != 1:
                raise EquipoiseError(
                    "a router without a bias of its own must choose by one torch.topk over its experts, as it did when "
                    f"it was attached: in this call {type(self).__name__} took {top_k.num_choices}, so no bias steers "
                    "it. Call detach() before a router is changed, and attach again after."
                )
        else:
            output = _forward_seen(self, base, seen, args, kwargs)
        if seen is not None:
            return _report_seen(self, tap, output, seen, args, kwargs)
        logits = None if adapter is None else take_logits(self)
        if tap is None or tap.router is None:  # detached, or a deep copy
            return output
        if tap.router is not self:
            id(self)  # Dynamo guards the graph of a shallow copy by this: it would serve the router too, uncounted
            return output
        if len(tap.dimensions) == 1:
            _check_input(self, tap, *args, *kwargs.values())
        return _report(self, tap, output, logits, args, kwargs)

    if hides_choice:  # Dynamo cannot go on under a mode after a break in the graph, and a capacity makes breaks
        forward = outside_graphs(forward)
    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]  # for inspect.signature
    methods = {} if adapter is None else methods_keeping_logits(base, adapter)
    return _subclass(base, _tapped_class, {"forward": forward, **methods}, adapter)


@cache
def _holding_class(base: Any) -> Any:
    """A subclass of a module that holds the slot of a router, if that is not the router itself."""
    return _subclass(base, _holding_class, {})


def _subclass(base: Any, class_of: Any, namespace: dict[str, Any], *arguments: Any) -> Any:
    """A subclass of ``base``. If the module holds a slot, its bias stays float32 in a cast, and a loaded checkpoint is
    adopted."""

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
        return _new, (class_of, base, *arguments), self.__getstate__()

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


def _new(class_of: Any, base: Any, *arguments: Any) -> nn.Module:
    cls = class_of(base, *arguments)
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


def _put_on(module: nn.Module, class_of: Any, *arguments: Any) -> None:
    """Swaps the class for our subclass, unless one from an earlier attach is below a class that others put on."""
    if not _has_layer(type(module), class_of):
        module.__class__ = class_of(type(module), *arguments)


def _take_off(module: nn.Module) -> None:
    """Swaps our class back. One below a class that others put on stays, and does nothing without a tap."""
    if not module.__dict__.keys() & {"_equipoise", "_equipoise_held"}:
        module.__class__ = plain_class(module)


def tap_router(layer: MoELayer, tap: Tap, added_slot: Float[Tensor, " experts"] | None) -> None:
    """Swaps the class of the router and of its slot's holder. ``added_slot`` becomes a buffer no checkpoint sees."""
    router, slot = layer.router, layer.slot
    tap.dimensions, tap.chooses_by_max = layer.dimensions, layer.chooses_by_max
    tap.num_experts, tap.has_groups = layer.num_experts, layer.has_groups
    if added_slot is not None:
        router.register_buffer(ADDED_SLOT, added_slot, persistent=False)
    tap.router = router
    router.__dict__["_equipoise"] = tap
    adapter = None if isinstance(layer.kind.gives, str) else layer.kind.gives
    if adapter is not None:
        tap.logits_hook = hook_keeping_logits(router, adapter)
        tap.argument_names = argument_names(router)
    _put_on(router, _tapped_class, *(() if adapter is None else (adapter,)))
    if slot is not None and slot.holder is not router:
        holder = slot.holder
        holder.__dict__["_equipoise_held"] = (*holder.__dict__.get("_equipoise_held", ()), tap)
        _put_on(holder, _holding_class)


def untap_router(router: nn.Module, slot: Slot | None) -> None:
    """Undoes ``tap_router``, and no more: what others put on the router since stays.

    The model's own slot keeps what it holds.
    """
    tap = router.__dict__.pop("_equipoise")
    if tap.logits_hook is not None:
        tap.logits_hook.remove()
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
