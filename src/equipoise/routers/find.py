"""Finds the routers of a model.

A module is a candidate if its forward takes tokens alone and returns what a router does, whatever its class is called.
So is one whose class is called a router, a gate or a gating, so that it can be named if it is refused, and one that
declares how it selects: an attribute or property ``router_kind``, a ``RouterKind``. ``prove`` then finds out by
experiment how a candidate selects, or why it is refused. A declared kind is proven in the same way.
"""

import logging
import re
import sys
import weakref
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import FORMS, RouterAdapter, declared_adapter
from equipoise.routers.blocks import MOVE, BlockAdapter, block_adapter
from equipoise.routers.fingerprint import NotComparable, fingerprint, tensor_shapes
from equipoise.routers.frameworks import advice, framework_adapter
from equipoise.routers.kind import MoELayer, RouterKind
from equipoise.routers.names import named_modules
from equipoise.routers.outputs import CONTRACT, LEAVE_OUT, Refused
from equipoise.routers.prove import Proof, chooses_by_id, discover, find_slot, prove
from equipoise.routers.shapes import whole_shape
from equipoise.routers.stand_in import returned_form, takes_tokens_alone
from equipoise.routers.tapped import plain_class
from equipoise.routing import SCORE_FUNCTIONS

_log = logging.getLogger("equipoise")

_ROUTER_NAME = re.compile(r"(router|gate|gating)$", re.IGNORECASE)
OLDEST_TRANSFORMERS = (5, 23)  # that pyproject.toml allows
_MAX_MODULES = 16  # in a router whose class has another name; nothing larger is looked at


def find_routers(model: nn.Module, allow_empty: bool = False) -> list[MoELayer]:
    """The routers of ``model``, in model order.

    Raises ``EquipoiseError`` if there is none, and says what was seen instead; with ``allow_empty`` only if something
    was seen. Raises it too for a router that declares its kind wrongly.
    """
    _PROOFS_OF_THIS_MODEL.clear()
    layers: list[MoELayer] = []
    refused: list[tuple[_Candidate, Refused]] = []
    for candidate in _candidates(model):
        name, module, parent, _ = candidate
        try:
            proof = proof_of(module, parent)
        except Refused as refusal_of_router:
            reason = _reason_outside(model, module) or refusal_of_router
            if _declared_kind(module) is not None:
                raise _refusal(name, module, reason) from None
            refused.append((candidate, reason))
            continue
        kind, num_experts, k, dimensions, obstacle, by_max, replay_obstacle, has_groups = proof
        slot = find_slot(module, parent, kind)
        own_balancing = kind.adapter.own_balancing(module, parent)
        steered = (slot, obstacle, dimensions, own_balancing, by_max, replay_obstacle, has_groups)
        layers.append(MoELayer(kind.adapter.layer_name(module, name), module, kind, num_experts, k, *steered))
    if layers:
        return _without_nested(layers)
    if allow_empty and not any(_is_moe_name(type(m).__name__) for m in model.modules() if m is not model):
        return []
    error = _no_router(model, [(candidate, reason) for candidate, reason in refused if candidate.is_certain])
    raise EquipoiseError(str(error) + advice(model))


def _refusal(name: str, router: nn.Module, reason: Refused) -> EquipoiseError:
    """The error for a router that cannot be attached."""
    kind = _declared_kind(router)
    must = f"as its router_kind says, {kind}" if kind is not None else "in a way that can be proven"
    return EquipoiseError(
        f"a router must select {must}: {name} ({type(router).__name__}) does not: {reason}. {reason.remedy}."
    )


def _no_router(model: nn.Module, refused: list[tuple["_Candidate", Refused]]) -> EquipoiseError:
    if refused:
        (name, module, *_), reason = refused[0]
        others = f" ({len(refused) - 1} more of its routers are refused)" if len(refused) > 1 else ""
        came = f"{name} ({type(module).__name__}) cannot be: {reason}{others}"
        return EquipoiseError(f"a model must hold a router that can be proven: {came}. {reason.remedy}.")
    names = {type(module).__name__ for module in model.modules()}
    similar = [n for n in sorted(names) if any(word in n.lower() for word in ("router", "moe", "expert", "gating"))]
    if similar:
        came = f"{type(model).__name__} holds {', '.join(similar)}, and no module that returns a choice of experts"
        outside = _reason_outside(model, next(m for m in model.modules() if type(m).__name__ in similar))
        remedy = CONTRACT if outside is None else f"{str(outside)[0].upper()}{str(outside)[1:]}. {outside.remedy}"
    else:
        came = f"{type(model).__name__} holds none, and nothing that is called a mixture of experts"
        remedy = "A pipeline stage of dense layers takes allow_empty=True. " + CONTRACT
    return EquipoiseError(
        f"a model must hold a router that can be proven: {came}. {remedy}. `equipoise families` lists the model "
        "families that can be attached."
    )


def _reason_outside(model: nn.Module, module: nn.Module) -> Refused | None:
    """Why a module of the model is not what it would be elsewhere: an old library, a wrapper."""
    has_matrix = any(len(whole_shape(parameter)) > 1 for parameter in module.parameters())
    if not has_matrix and any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        return Refused(
            "FullyShardedDataParallel has flattened its weights",
            "Attach before it wraps the model with use_orig_params=True, or shard the model by fully_shard",
        )
    version = getattr(sys.modules.get("transformers"), "__version__", None)
    if version is None or not type(module).__module__.startswith("transformers."):
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers >= OLDEST_TRANSFORMERS:
        return None
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    return Refused(
        f"its class is of Transformers {version}, and the oldest version that is supported is {oldest}",
        f"Install transformers>={oldest}",
    )


def _without_nested(layers: list[MoELayer]) -> list[MoELayer]:
    """Where one router is inside another, keeps the one that chooses.

    That is the inner one, unless the outer one has a slot outside it, or is the one that declares how it selects.
    """
    dropped: set[nn.Module] = set()
    for outer in layers:
        inside = {module for module in outer.router.modules() if module is not outer.router}
        for inner in (layer for layer in layers if layer.router in inside):
            outer_has_slot = outer.slot is not None and outer.slot.holder not in set(inner.router.modules())
            declares = _declared_kind(outer.router) is not None and _declared_kind(inner.router) is None
            dropped.add(inner.router if outer_has_slot or declares else outer.router)
    return [layer for layer in layers if layer.router not in dropped]


# ---- candidates ----


class _Candidate(NamedTuple):
    name: str
    module: nn.Module
    parent: nn.Module | None
    is_certain: bool  # it is called a router, or returns the ids and weights of experts


def _candidates(model: nn.Module) -> list[_Candidate]:
    candidates = []
    for named in named_modules(model):
        cls: Any = type(named.module)
        is_named = _has_router_name(cls) or _is_declared(named.module)
        form = "named" if is_named else _form_of(named.module)
        if form is not None:
            candidates.append(_Candidate(*named, is_certain=form != "dense"))
    modules = {candidate.module for candidate in candidates if candidate.is_certain}
    for named in named_modules(model):  # blocks that route by themselves
        block = block_adapter(named.module)
        if block is not None and modules.isdisjoint(
            named.module.modules()
        ):  # a head may have as many outputs as layers
            candidates.append(_Candidate(*named, is_certain=block.is_named_as_gate))
    return candidates


_FORMS: dict[Any, str | None] = {}  # by class, forward and shapes: what the forward returns


def _form_of(module: nn.Module) -> str | None:
    """What a module returns if it may be a router: ``choice`` or ``dense``. Cheap for all that are none."""
    cls = plain_class(module)
    has_matrix = module._modules or any(p is not None and len(whole_shape(p)) == 2 for p in module._parameters.values())
    if not has_matrix or not takes_tokens_alone(cls, cls.forward):
        return None
    parameters = list(islice(module.parameters(), 2 * _MAX_MODULES))
    if max((len(whole_shape(parameter)) for parameter in parameters), default=0) != 2:
        return None
    key = (cls, cls.forward, tuple(map(whole_shape, parameters)))
    if key not in _FORMS:
        is_small = len(list(islice(module.modules(), _MAX_MODULES + 1))) <= _MAX_MODULES
        _FORMS[key] = returned_form(module) if is_small else None
    return _FORMS[key]


def _declared_kind(module: nn.Module) -> RouterKind | None:
    # Not by getattr: wrappers of torch.compile and checkpointing would answer for the module inside.
    holders = (module.__dict__, *map(vars, type(module).__mro__))
    if any(holder.get("router_kind") is not None for holder in holders):
        declared: Any = module.router_kind
        if not isinstance(declared, RouterKind):
            raise EquipoiseError(
                f"router_kind of a {type(module).__name__} must be an equipoise.RouterKind(score_function, slot): got "
                f"{declared!r}. Without router_kind, attach finds out by experiment how the router selects."
            )
        knows_router = declared.score_function in SCORE_FUNCTIONS and declared.selection in ("scores", "logits")
        if not knows_router or not (isinstance(declared.gives, RouterAdapter) or declared.gives in FORMS):
            raise EquipoiseError(
                f"router_kind of a {type(module).__name__} must have a score_function of {', '.join(SCORE_FUNCTIONS)}, "
                f"selection by scores or logits, and gives {', '.join(FORMS)} or a RouterAdapter: got {declared!r}. "
                "Correct it, or leave router_kind out."
            )
        return declared
    return None


def _is_declared(module: nn.Module) -> bool:
    return _declared_kind(module) is not None or _known_adapter(module) is not None


def _known_adapter(router: nn.Module) -> RouterAdapter | None:
    """How a router is called and read, if it or its class declares that, or if it belongs to a known framework."""
    declared = declared_adapter(router)
    return framework_adapter(plain_class(router)) if declared is None else declared


def adapter_of(router: nn.Module) -> RouterAdapter | None:
    """How a router, or a block that routes by itself, is called and read; None: by the form of its output."""
    known = _known_adapter(router)
    return block_adapter(router) if known is None else known


@cache
def _has_router_name(cls: Any) -> bool:
    """Whether the class, or a base of it outside torch, is called a router."""
    return any(_ROUTER_NAME.search(base.__name__) for base in _own_classes(cls))


def _own_classes(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if not base.__module__.startswith("torch.") and base is not object]


def _is_moe_name(name: str) -> bool:
    """By the end of the name: too many families have "Moe" in the names of dense layers, as in Glm4MoeRMSNorm."""
    return name.lower().endswith(("router", "gate", "gating", "moe", "experts", "moeblock", "moelayer"))


# ---- proofs, one for all routers that are alike ----

_PROOFS: dict[Any, Proof | Refused] = {}  # by fingerprint; of a refused router the reason
# Of routers without a fingerprint, while one model is looked at.
_PROOFS_OF_THIS_MODEL: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Proof | Refused]]" = weakref.WeakKeyDictionary()


def proof_of(router: nn.Module, parent: nn.Module | None = None, multiplies: bool = False) -> Proof:
    """How a router selects, proven once for all that are alike. Raises ``Refused`` with the reason."""
    if "forward" in vars(router):
        raise Refused(
            "its forward was replaced on the instance, as the hooks of accelerate do (device_map, offload)",
            "Attach before that",
        )
    declared, adapter = _declared_kind(router), adapter_of(router)
    try:
        key: Any = (declared, adapter, multiplies, fingerprint(router), tensor_shapes(parent))
        hash(key)
        proofs: Any = _PROOFS
    except (NotComparable, ValueError, TypeError, RecursionError):  # an empty cell, something unhashable or endless
        key, proofs = (declared, adapter, multiplies), _PROOFS_OF_THIS_MODEL.setdefault(router, {})
    if key not in proofs:
        proofs[key] = _prove(router, parent, declared, adapter, multiplies)
    proof = proofs[key]
    if isinstance(proof, Refused):
        raise Refused(str(proof), proof.remedy)  # an error that is raised twice would keep the first traceback
    return proof


def _prove(
    router: nn.Module,
    parent: nn.Module | None,
    declared: RouterKind | None,
    adapter: RouterAdapter | None,
    multiplies: bool,
) -> Proof | Refused:
    try:
        with torch.random.fork_rng(devices=[]):  # some routers draw noise
            if declared is not None:
                return prove(router, declared, parent, multiplies)
            proof = discover(router, parent, adapter)
            return prove(router, proof.kind, parent, multiplies) if multiplies else proof
    except Refused as reason:
        is_general = isinstance(adapter, BlockAdapter) and reason.remedy in (CONTRACT, LEAVE_OUT)
        return Refused(str(reason), MOVE if is_general else reason.remedy)
    except Exception as error:  # a forward may raise anything once a bias moves its choice
        return Refused(f"its forward raised {type(error).__name__}: {error}, on random tokens", CONTRACT)


# ---- routers that are not attached ----


def unknown_routers(model: nn.Module) -> list[str]:
    """Routers and mixture-of-experts blocks that cannot be attached, and why. Hash layers are named in the log only."""
    candidates = _candidates(model)
    refused = list(_refused_routers(candidates))
    if hashed := [name for name, _, reason in refused if reason is None]:
        _log.warning(
            f"attach: {', '.join(hashed)} {'is a hash layer' if len(hashed) == 1 else 'are hash layers'}, which choose "
            "by the id of the token: neither counted nor balanced; the other layers are."
        )
    no_router = f"no module in it returns a choice of experts. {CONTRACT}"
    refused += [(name, module, no_router) for name, module in _moe_blocks(model, candidates)]
    return [f"{name} ({type(module).__name__}: {reason})" for name, module, reason in refused if reason is not None]


def hash_routers(model: nn.Module) -> list[str]:
    """Names of the routers that choose by the id of the token. No bias steers them."""
    return [name for name, _, reason in _refused_routers(_candidates(model)) if reason is None]


def _refused_routers(candidates: list[_Candidate]) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Name, module and reason; None as the reason for a hash router."""
    inside_router: set[nn.Module] = set()
    refused: list[tuple[str, nn.Module, str]] = []
    for name, module, parent, is_certain in candidates:
        try:
            proof_of(module, parent)
            inside_router.update(module.modules())
        except Refused as reason:
            if is_certain and _may_be_router(module):
                refused.append((name, module, str(reason)))
    for name, module, reason_text in refused:
        if module not in inside_router:
            yield name, module, None if chooses_by_id(module) else reason_text


def _may_be_router(module: nn.Module) -> bool:
    """Not every gate is a router: attention has forget gates."""
    cls: Any = type(module)
    if not _has_router_name(cls):
        return True  # known by what it returns
    weight = module._parameters.get("weight")
    has_name = any(re.search("router|gating", cls.__name__, re.IGNORECASE) for cls in _own_classes(type(module)))
    has_matrix = any(len(whole_shape(p)) == 2 for p in module.parameters())
    return has_matrix and (has_name or (weight is not None and len(whole_shape(weight)) == 2))


def _moe_blocks(model: nn.Module, candidates: list[_Candidate]) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the mixture-of-experts blocks without a candidate inside."""
    modules = {candidate.module for candidate in candidates}
    seen: set[nn.Module] = set()  # modules of blocks that hold a router, such as their experts
    for candidate in candidates:
        if candidate.parent is not None and candidate.parent is not model:
            seen.update(candidate.parent.modules())
    for name, module, _ in named_modules(model):
        endings = ("moe", "moeblock", "moelayer")
        is_block = any(cls.__name__.lower().endswith(endings) for cls in _own_classes(type(module)))
        if module in seen or not is_block or isinstance(module, nn.ModuleList):
            continue
        inside = set(module.modules())
        if modules.isdisjoint(inside) and any(True for _ in module.parameters()):
            seen |= inside
            yield name, module
