"""The routers of a model: which modules they are, and how each selects.

A module is looked at when its class is called a router, a gate or a gating, or when it says itself how it selects: an
attribute or property ``router_kind`` that holds a ``RouterKind``. ``discovery`` finds out how, or why not, by what the
router does on random tokens; a declared kind is proven in the same way.
"""

import logging
import re
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sized
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from equipoise.errors import EquipoiseError
from equipoise.routers.prove import Proof, Refused, chooses_by_id, discover, find_slot, prove
from equipoise.routers.tap import OWN_SLOT, RouterKind, Slot, plain_class

__all__ = ["FoundRouter", "find_routers", "hash_routers", "plain_name", "proof_of", "unknown_routers"]

_log = logging.getLogger("equipoise")

_CALLED = re.compile(r"(router|gate|gating)$", re.IGNORECASE)
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")


class FoundRouter(NamedTuple):
    """One router of a model: its name, the module, how it selects, and the tensor of its family that steers it."""

    name: str
    module: nn.Module
    kind: RouterKind
    slot: Slot | None
    num_experts: int
    k: int


def plain_name(name: str) -> str:
    """A module's name without what torch.compile, DDP and checkpoint wrappers put into it.

    >>> plain_name("module._orig_mod.layers.1.gate")
    'layers.1.gate'
    """
    name += "."  # a wrapper may stand at the end too
    for wrapper in _WRAPPERS[:-1]:
        name = name.replace(wrapper, "")
    name = name.removesuffix(".")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _declared(module: nn.Module) -> RouterKind | None:
    # not by getattr: wrappers of torch.compile and checkpointing would answer with what the module inside declares
    holders = (module.__dict__, *map(vars, type(module).__mro__))
    if any(holder.get("router_kind") is not None for holder in holders):
        declared: Any = module.router_kind
        if not isinstance(declared, RouterKind):
            raise EquipoiseError(
                f"router_kind of a {type(module).__name__} must be an equipoise.RouterKind(score_function, slot): got "
                f"{declared!r}. Leave it out to have it found out by what the router does."
            )
        return declared
    return None


@cache
def _is_called_router(cls: Any) -> bool:
    """Its class, or one that it is made from, but not torch's own."""
    return any(_CALLED.search(base.__name__) for base in _classes(cls))


_PROOFS: dict[Any, Proof | str] = {}  # by what a router is made of; of one that was refused the reason
# of those that are like no other, while one model is looked at
_OF_THIS_MODEL: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Proof | str]]" = weakref.WeakKeyDictionary()


def proof_of(router: nn.Module, parent: nn.Module | None = None, multiplies: bool = False) -> Proof:
    """How a router selects, proven once for all that are alike; ``Refused`` with the reason where nothing is proven."""
    if "forward" in vars(router):
        raise Refused(
            "its forward was replaced on the instance, as the hooks of accelerate do (device_map, offload): attach "
            "before that"
        )
    declared = _declared(router)
    try:
        key: Any = (declared, multiplies, _made_of(router), _tensors(parent))
        hash(key)
        proofs: Any = _PROOFS
    except (_Unlike, ValueError, TypeError, RecursionError):  # an empty cell, what cannot be hashed or has no end
        key, proofs = (declared, multiplies), _OF_THIS_MODEL.setdefault(router, {})
    if key not in proofs:
        try:
            proofs[key] = _proven(router, parent, declared, multiplies)
        except Refused as refused:
            proofs[key] = str(refused)
    found = proofs[key]
    if isinstance(found, str):
        raise Refused(found)
    return found


def _proven(router: nn.Module, parent: nn.Module | None, declared: RouterKind | None, multiplies: bool) -> Proof:
    try:
        with torch.random.fork_rng(devices=[]):  # some draw noise
            proof = discover(router, parent) if declared is None else prove(router, declared, parent, multiplies)
            return prove(router, proof.kind, parent, multiplies) if declared is None and multiplies else proof
    except Refused:
        raise
    except Exception as error:  # whatever a forward makes of tokens that are not its own
        raise Refused(f"its forward fails on random tokens ({type(error).__name__}: {error})") from None


class _Unlike(Exception):
    """Something is held of which nobody can say whether it is like another."""


_OF_MODULES = vars(nn.Module()).keys() - {"training"}
_MOST = 4000  # of what a router holds, before it is proven by itself


def _made_of(router: nn.Module) -> Any:
    """What its forward may depend on, of it and of what is inside: classes, attributes, shapes of its tensors."""
    seen: dict[int, tuple[int, Any]] = {}
    found = []
    for path, module in router.named_modules():
        base = plain_class(module)
        held = {name: value for name, value in vars(module).items() if name not in _OF_MODULES | {"_equipoise"}}
        found.append((path, base, base.forward, _alike(held, seen), _tensors(module)))
    return tuple(found)


def _alike(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """Equal for what a forward cannot tell apart, and hashable; it keeps no tensor and no module alive. ``seen`` keeps
    what was visited, since an address may be another object's a moment later."""
    if value is None or isinstance(value, int | float | str | bytes | type | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, ModuleType | logging.Logger):
        return type(value), value.__name__ if isinstance(value, ModuleType) else value.name
    if id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value
    if len(seen) > _MOST or (isinstance(value, Sized) and len(value) > _MOST):
        raise _Unlike
    if isinstance(value, Mapping):
        return type(value), tuple((_alike(k, seen), _alike(v, seen)) for k, v in value.items())
    if isinstance(value, list | tuple | deque):
        return type(value), tuple(_alike(item, seen) for item in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_alike(item, seen) for item in value)
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, nn.Module | torch.Tensor):
        return value
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, _alike([cells, value.__defaults__, value.__kwdefaults__], seen)
    if isinstance(value, MethodType):
        return _alike([value.__func__, value.__self__], seen)
    if isinstance(value, partial):
        return _alike([value.func, value.args, value.keywords], seen)
    if isinstance(value, nn.Module | torch.Tensor) or not hasattr(value, "__dict__"):
        raise _Unlike
    return type(value), _alike(vars(value), seen)


def _tensors(module: nn.Module | None) -> tuple[Any, ...]:
    if module is None:
        return ()
    held = {**module._buffers, **module._parameters}
    return tuple((name, tuple(value.shape)) for name, value in held.items() if value is not None and name != OWN_SLOT)


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Name, module and the module around it, of all that may be routers, in model order."""
    found = []
    around: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        around.update(dict.fromkeys(module.children(), module))
        cls: Any = type(module)
        if _is_called_router(cls) or _declared(module) is not None:
            found.append((plain_name(name), module, around.get(module)))
    return found


def _classes(cls: type) -> list[type]:
    """A class and those that it is made from, but not torch's own."""
    return [base for base in cls.__mro__ if not base.__module__.startswith("torch.") and base is not object]


def find_routers(model: nn.Module, allow_empty: bool = False) -> list[FoundRouter]:
    """The routers of ``model`` in model order. None at all is an error that names what was seen instead; with
    ``allow_empty`` only where something was seen. One that says itself how it selects, wrongly, is an error too."""
    _OF_THIS_MODEL.clear()
    found, refused = [], []
    for name, module, parent in _candidates(model):
        try:
            kind, num_experts, k = proof_of(module, parent)
        except Refused as reason:
            if _declared(module) is not None:
                raise refusal(name, module, str(reason)) from None
            refused.append(f"{name} ({type(module).__name__}: {reason})")
            continue
        found.append(FoundRouter(name, module, kind, find_slot(module, parent, kind), num_experts, k))
    if found:
        return _choosers(found)
    seen = sorted({type(m).__name__ for m in model.modules() if _looks_like_moe(type(m).__name__)})
    if allow_empty and not any(_is_moe(type(m).__name__) for m in model.modules() if m is not model):
        return []
    if refused:
        what = f"none that it knows: {refused[0]}" + (f" and {len(refused) - 1} more" if len(refused) > 1 else "")
    elif seen:
        what = f"none, but {', '.join(seen)}, which it does not know"
    else:
        what = "none and no other mixture-of-experts layer"
    raise EquipoiseError(
        f"the model must hold a router that equipoise knows: {type(model).__name__} holds {what}. `equipoise families` "
        "lists the model families that can be attached; in a model of your own use equipoise.nn.Router, or give your "
        "router an attribute router_kind, an equipoise.RouterKind(score_function, slot); a pipeline stage of dense layers takes "
        "allow_empty=True."
    )


def _choosers(found: list[FoundRouter]) -> list[FoundRouter]:
    """Of a router in another one the one that chooses: the inner one, unless the outer one has a slot of its own beside
    it, or is the one that says how it selects."""
    dropped: set[nn.Module] = set()
    for outer in found:
        within = {module for module in outer.module.modules() if module is not outer.module}
        for inner in (one for one in found if one.module in within):
            own = outer.slot is not None and outer.slot.holder not in set(inner.module.modules())
            says = _declared(outer.module) is not None and _declared(inner.module) is None
            dropped.add(inner.module if own or says else outer.module)
    return [one for one in found if one.module not in dropped]


def refusal(name: str, router: nn.Module, reason: str, kind: RouterKind | None = None) -> EquipoiseError:
    kind = _declared(router) if kind is None else kind
    must = "select in a way that can be proven"
    if kind is not None:
        must = f"select by {kind.score_function} {kind.selection}"
        must += f" plus its {kind.slot}" if kind.slot else " with one top-k over its experts"
    return EquipoiseError(
        f"a {type(router).__name__} must {must}: in {name} {reason}. It is not supported so; attach with where=... to "
        "leave it out."
    )


def unknown_routers(model: nn.Module) -> list[str]:
    """Names of modules that are called a router or a gate, have a weight of two dimensions, and select in no way that
    is known, and of mixture-of-experts blocks in which nothing is called so, with the reason. Hash layers are not among
    them: they are as they should be, and named in the log."""
    left_out = list(_left_out(model))
    if hashed := [name for name, _, reason in left_out if reason is None]:
        _log.warning(
            f"attach: {', '.join(hashed)} {'is a hash layer' if len(hashed) == 1 else 'are hash layers'}, which choose "
            "by the id of the token: neither counted nor balanced; the other layers are."
        )
    left_out += [(name, module, "nothing in it is called a router or a gate") for name, module in _blocks(model)]
    return [f"{name} ({type(module).__name__}: {reason})" for name, module, reason in left_out if reason is not None]


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the mixture-of-experts blocks in which nothing is called a router."""
    found = _candidates(model)
    candidates = {module for _, module, _ in found}
    inside: set[nn.Module] = set()  # of a block that holds a router: its experts
    for _, _, around in found:
        inside.update(() if around is None or around is model else around.modules())
    for name, module in model.named_modules():
        called = any(cls.__name__.lower().endswith(("moe", "moeblock", "moelayer")) for cls in _classes(type(module)))
        if module in inside or not called or isinstance(module, nn.ModuleList):
            continue
        within = set(module.modules())
        if candidates.isdisjoint(within) and any(True for _ in module.parameters()):
            inside |= within
            yield plain_name(name), module


def hash_routers(model: nn.Module) -> list[str]:
    """Names of the routers that choose by the id of the token, which no bias moves."""
    return [name for name, _, reason in _left_out(model) if reason is None]


def _left_out(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Name, module and reason of the routers that are not known; a hash router needs no reason."""
    inside: set[nn.Module] = set()
    refused: list[tuple[str, nn.Module, str]] = []
    for name, module, parent in _candidates(model):
        try:
            proof_of(module, parent)
            inside.update(module.modules())
        except Refused as reason:
            refused.append((name, module, str(reason)))
    for name, module, why in refused:
        if module not in inside and _is_router(module):
            yield name, module, None if chooses_by_id(module) else why


def _is_router(module: nn.Module) -> bool:
    """Not every gate is one: attention has forget gates."""
    weight = module._parameters.get("weight")
    named = any(re.search("router|gating", cls.__name__, re.IGNORECASE) for cls in _classes(type(module)))
    matrix = any(p.dim() == 2 for p in module.parameters())
    return matrix and (named or getattr(weight, "ndim", 0) == 2)


def _looks_like_moe(name: str) -> bool:
    return any(word in name.lower() for word in ("router", "moe", "expert", "gating"))


def _is_moe(name: str) -> bool:
    """Of dense layers too many families have "Moe" in their name, as Glm4MoeRMSNorm."""
    return name.lower().endswith(("router", "score_function", "gating", "moe", "experts", "moeblock", "moelayer"))
