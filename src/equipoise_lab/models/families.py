"""The families of the installed Transformers, found in its own files: no list of ours can go out of date.

Every modeling file that defines a class called a router or a gate is imported, the router is built from the family's
own config on the meta device (within the block that holds it, where there is one, because some blocks pass the slot
in), and what it does is found out as ``attach`` would.
"""

import contextlib
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise.routers.find import proof_of
from equipoise.routers.prove import Refused, find_slot

__all__ = ["Family", "families", "tested_routers"]

TESTED = Path(__file__).with_name("tested.json")

_ROUTER = re.compile(r"^class (\w*(?:Router|Gating|Gate))\(", re.MULTILINE)
_EXPERTS = re.compile(r"^class (\w*(?:MoE|Moe|MoEBlock|MoeBlock|Experts))\(", re.MULTILINE)
_GROUPS = ("num_group", "num_groups", "n_group", "num_expert_group")
_DIM = 32  # of the hidden state: how a router selects does not depend on it

OWN: dict[str, dict[str, Any]] = {  # by config: what its defaults leave out of a model with experts
    "DbrxConfig": {"moe_jitter_eps": None, "moe_num_experts": 16},
    "DeepseekOcr2TextConfig": {"num_experts_per_tok": 6},
    "DeepseekV2Config": {"num_experts_per_tok": 6},
    "DiffusionGemmaTextConfig": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 32},
    "Dots1Config": {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6},
    "Dots3NoteVisionConfig": {"num_local_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 32},
    "Gemma4TextConfig": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 32},
    "HunYuanMoEV1Config": {"num_experts": 64, "moe_topk": 8},
}


@dataclass(frozen=True)
class Family:
    """One router class of one family, and whether ``attach`` takes it. What was not found out is None."""

    model_type: str
    router: str | None
    score_function: str | None
    selection: str | None  # what the bias is added to: scores or logits
    gives: str | None
    slot: str | None
    slot_held_by: str | None  # "router", "part" (a module inside it) or "block" (the module around it)
    group_limits: bool
    hash_layers: bool  # of the family: layers that choose by the id of the token
    supported: bool
    tested: bool
    reason: str | None  # why it is not supported


def families(told: Callable[[int, int, str], None] = lambda done, total, name: None) -> list[Family]:
    """All of them, by model type. ``told(done, total, package)`` is called before each import."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny; threads that wait for each other take most of the time
    try:
        return _families(told)
    finally:
        torch.set_num_threads(num_threads)


def _families(told: Callable[[int, int, str], None]) -> list[Family]:
    packages = list(_packages())
    tested = tested_routers()
    found: list[Family] = []
    for done, (package, stem, routers, blocks) in enumerate(packages):
        told(done, len(packages), package)
        model_type = _model_type(package)
        if not routers:
            reason = (
                f"its router is no module of its own: {' and '.join(blocks)} {'hold' if blocks[1:] else 'holds'} it"
            )
            found.append(_unsupported(model_type, None, False, reason))
            continue
        module = importlib.import_module(f"transformers.models.{package}.{stem}")
        classes = [getattr(module, name) for name in routers if hasattr(module, name)]
        hashed = any("input_ids" in inspect.signature(cls.forward).parameters for cls in classes)
        known = tested.get(model_type, [])
        rows = (_family(module, cls, model_type, hashed, cls.__name__ in known) for cls in classes)
        found += [row for row in rows if row is not None]
    return found


def tested_routers() -> dict[str, list[str]]:
    """By model type, the router classes that our tests passed; none of another Transformers than theirs."""
    import transformers

    content = json.loads(TESTED.read_text(encoding="utf-8"))
    same = transformers.__version__.split(".")[:2] == content["transformers"].split(".")[:2]
    return content["routers"] if same else {}


def _packages() -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Package, module, router classes and, where there is none, classes of experts."""
    import transformers

    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        routers = _ROUTER.findall(text)
        blocks = [] if routers else _EXPERTS.findall(text)
        if routers or blocks:
            yield path.parent.name, path.stem, routers, blocks


def _model_type(package: str) -> str:
    """The name of a package's models in a config: mostly that of the package."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    types = [name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) == package]
    whole = [name for name in types if not re.search(r"_(text|vision|audio|encoder)(_model)?$", name)]
    return package if package in types or not types else (whole or types)[0]


def _unsupported(model_type: str, router: str | None, hashed: bool, reason: str) -> Family:
    return Family(model_type, router, None, None, None, None, None, False, hashed, False, False, reason)


def _family(module: Any, cls: type[nn.Module], model_type: str, hashed: bool, tested: bool) -> Family | None:
    """None for a gate of something else: it says nothing of experts, and selects none."""
    built = next(_built(module, cls), None)
    try:
        if built is None:
            raise Refused("it cannot be built from the default config")
        router, parent = built
        kind, _, _ = proof_of(router, parent)
    except Refused as reason:
        if "expert" not in inspect.getsource(cls):
            return None
        return _unsupported(model_type, cls.__name__, hashed, str(reason))
    slot = find_slot(router, parent, kind)
    held_by = None if slot is None else "router" if slot.holder is router else "part"
    if slot is not None and slot.holder is parent:
        held_by = "block"
    grouped = any(hasattr(router, name) for name in _GROUPS)
    return Family(
        model_type,
        cls.__name__,
        kind.score_function,
        kind.selection,
        kind.gives,
        kind.slot,
        held_by,
        grouped,
        hashed,
        True,
        tested,
        None,
    )


def _built(module: Any, cls: type[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """The router on the meta device and the block that holds it, from each config that it can be built from."""
    holders = [holder for holder in _holders(module, cls.__name__) if holder is not None]
    for config_class in _configs(module, [*holders, cls]):
        for small in (True, False):
            for outer in (*holders, cls):
                for layer in (-1, 0):
                    with contextlib.suppress(Exception):  # another config, another layer, by itself
                        block = _build(outer, config_class, small, layer)
                        for part in block.modules():
                            if type(part) is cls:
                                yield part, None if part is block else _parent(block, part)


def _parent(block: nn.Module, router: nn.Module) -> nn.Module:
    return next(module for module in block.modules() if router in module.children())


def _holders(module: Any, name: str) -> Iterator[type[nn.Module] | None]:
    """Classes whose ``__init__`` makes the router."""
    source = inspect.getsource(module)
    for block in re.split(r"^(?=class )", source, flags=re.MULTILINE):
        if re.search(rf"self\.\w+ = [^\n]*\b{name}\(", block) and (found := re.match(r"class (\w+)", block)):
            holder = getattr(module, found.group(1), None)
            yield holder if inspect.isclass(holder) and issubclass(holder, nn.Module) else None


def _configs(module: Any, classes: list[type[nn.Module]]) -> list[type]:
    """The configs that a module knows: first what a class asks for, then those of text."""
    from transformers import PretrainedConfig

    known = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, PretrainedConfig)]
    known = [value for value in known if value.__module__ != PretrainedConfig.__module__]
    asked = [p.annotation for cls in classes for p in inspect.signature(cls.__init__).parameters.values()]
    names = {getattr(annotation, "__name__", str(annotation)) for annotation in asked}
    return sorted(known, key=lambda cls: (cls.__name__ not in names, "Text" not in cls.__name__))


def _build(cls: type[nn.Module], config_class: type, small: bool, layer: int) -> nn.Module:
    config = config_class(**OWN.get(config_class.__name__, {}))
    num_layers = getattr(config, "num_hidden_layers", 1)
    for name in ("hidden_size", "d_model") if small else ():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, _DIM)
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    given: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.name == "config":
            given["config"] = config
        elif "layer" in parameter.name and parameter.default in (parameter.empty, None):
            given[parameter.name] = num_layers - 1 if layer else 0
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**given)
