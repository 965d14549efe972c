"""The families of the installed Transformers, read from its own files, so that no list of ours can go out of date.

Every modeling file that defines a router or gate class is imported. Its router is built on the meta device from the
family's own config, inside the block that holds it if there is one: some blocks pass the slot to the router. Then
its selection is proven exactly as ``attach`` does.
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
from equipoise.routers.outputs import Refused
from equipoise.routers.prove import find_slot

__all__ = ["Family", "families", "load_tested_routers"]

TESTED = Path(__file__).with_name("tested.json")

_ROUTER = re.compile(r"^class (\w*(?:Router|Gating|Gate))\(", re.MULTILINE)
_EXPERTS = re.compile(r"^class (\w*(?:MoE|Moe|MoEBlock|MoeBlock|Experts))\(", re.MULTILINE)
_GROUPS = ("num_group", "num_groups", "n_group", "num_expert_group")
_HIDDEN_SIZE = 32  # small: how a router selects does not depend on it

# by config class: values for a model with experts that the config's defaults leave out
CONFIG_OVERRIDES: dict[str, dict[str, Any]] = {
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
    """One router class of one family, and whether ``attach`` supports it. None means not known."""

    model_type: str
    router: str | None
    score_function: str | None
    selection: str | None  # what the bias is added to: scores or logits
    gives: str | None
    slot: str | None
    slot_held_by: str | None  # "router", "part" (a module inside it) or "block" (the module around it)
    group_limits: bool
    hash_layers: bool  # the family has layers that choose by token id
    supported: bool
    tested: bool
    reason: str | None  # why it is not supported


def families(on_progress: Callable[[int, int, str], None] = lambda done, total, package: None) -> list[Family]:
    """All families by model type. Calls ``on_progress(done, total, package)`` before each import."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: with more threads most of the time goes into waiting
    try:
        return _families(on_progress)
    finally:
        torch.set_num_threads(num_threads)


def _families(on_progress: Callable[[int, int, str], None]) -> list[Family]:
    packages = list(_packages())
    tested = load_tested_routers()
    rows: list[Family] = []
    for done, (package, stem, routers, blocks) in enumerate(packages):
        on_progress(done, len(packages), package)
        model_type = _model_type(package)
        if not routers:
            holds = "hold" if len(blocks) > 1 else "holds"
            reason = f"its router is not a module of its own: {' and '.join(blocks)} {holds} it"
            rows.append(_unsupported(model_type, None, False, reason))
            continue
        module = importlib.import_module(f"transformers.models.{package}.{stem}")
        classes = [getattr(module, name) for name in routers if hasattr(module, name)]
        has_hash_layers = any("input_ids" in inspect.signature(cls.forward).parameters for cls in classes)
        tested_names = tested.get(model_type, [])
        for cls in classes:
            row = _family(module, cls, model_type, has_hash_layers, cls.__name__ in tested_names)
            if row is not None:
                rows.append(row)
    return rows


def load_tested_routers() -> dict[str, list[str]]:
    """By model type, the router classes that pass our tests; empty if another Transformers version is installed."""
    import transformers

    content = json.loads(TESTED.read_text(encoding="utf-8"))
    is_same_version = transformers.__version__.split(".")[:2] == content["transformers"].split(".")[:2]
    return content["routers"] if is_same_version else {}


def _packages() -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Package, module and router classes; if there are none, the classes of experts."""
    import transformers

    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        routers = _ROUTER.findall(text)
        blocks = [] if routers else _EXPERTS.findall(text)
        if routers or blocks:
            yield path.parent.name, path.stem, routers, blocks


def _model_type(package: str) -> str:
    """The ``model_type`` of a package's models: usually the package's own name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    types = [name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) == package]
    whole_models = [name for name in types if not re.search(r"_(text|vision|audio|encoder)(_model)?$", name)]
    return package if package in types or not types else (whole_models or types)[0]


def _unsupported(model_type: str, router: str | None, has_hash_layers: bool, reason: str) -> Family:
    return Family(model_type, router, None, None, None, None, None, False, has_hash_layers, False, False, reason)


def _family(module: Any, cls: type[nn.Module], model_type: str, has_hash_layers: bool, tested: bool) -> Family | None:
    """None for a gate that selects no experts: it cannot be proven, and its source does not mention experts."""
    built = next(_built_routers(module, cls), None)
    try:
        if built is None:
            raise Refused("it cannot be built from the default config")
        router, parent = built
        proof = proof_of(router, parent)
        kind = proof.kind
        if proof.obstacle is not None:
            raise Refused(proof.obstacle)
    except Refused as reason:
        if "expert" not in inspect.getsource(cls):
            return None
        return _unsupported(model_type, cls.__name__, has_hash_layers, str(reason))
    slot = find_slot(router, parent, kind)
    held_by = None if slot is None else "router" if slot.holder is router else "part"
    if slot is not None and slot.holder is parent:
        held_by = "block"
    return Family(
        model_type=model_type,
        router=cls.__name__,
        score_function=kind.score_function,
        selection=kind.selection,
        gives=str(kind.gives),
        slot=kind.slot,
        slot_held_by=held_by,
        group_limits=any(hasattr(router, name) for name in _GROUPS),
        hash_layers=has_hash_layers,
        supported=True,
        tested=tested,
        reason=None,
    )


def _built_routers(module: Any, cls: type[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Router and the block that holds it, on the meta device, for every way of building them that works.

    Tries each config of the module, small and at its own size, with and without the block, for the last and the first
    layer.
    """
    block_classes = list(_block_classes(module, cls.__name__))
    for config_class in _config_classes(module, [*block_classes, cls]):
        for small in (True, False):
            for outer_class in (*block_classes, cls):
                for is_last_layer in (True, False):
                    with contextlib.suppress(Exception):  # many of these do not fit together
                        outer = _build(outer_class, config_class, small, is_last_layer)
                        for part in outer.modules():
                            if type(part) is cls:
                                yield part, None if part is outer else _parent(outer, part)


def _parent(block: nn.Module, router: nn.Module) -> nn.Module:
    return next(module for module in block.modules() if router in module.children())


def _block_classes(module: Any, router_name: str) -> Iterator[type[nn.Module]]:
    """Classes that create the router in their ``__init__``."""
    source = inspect.getsource(module)
    for class_source in re.split(r"^(?=class )", source, flags=re.MULTILINE):
        name = re.match(r"class (\w+)", class_source)
        if name and re.search(rf"self\.\w+ = [^\n]*\b{router_name}\(", class_source):
            cls = getattr(module, name.group(1), None)
            if inspect.isclass(cls) and issubclass(cls, nn.Module):
                yield cls


def _config_classes(module: Any, classes: list[type[nn.Module]]) -> list[type]:
    """The config classes of a module: first those that ``classes`` are annotated with, then configs of text models."""
    from transformers import PretrainedConfig

    configs = [cls for cls in vars(module).values() if inspect.isclass(cls) and issubclass(cls, PretrainedConfig)]
    configs = [cls for cls in configs if cls.__module__ != PretrainedConfig.__module__]
    annotations = [p.annotation for cls in classes for p in inspect.signature(cls.__init__).parameters.values()]
    names = {getattr(annotation, "__name__", str(annotation)) for annotation in annotations}
    return sorted(configs, key=lambda cls: (cls.__name__ not in names, "Text" not in cls.__name__))


def _build(cls: type[nn.Module], config_class: type, small: bool, is_last_layer: bool) -> nn.Module:
    config = config_class(**CONFIG_OVERRIDES.get(config_class.__name__, {}))
    num_layers = getattr(config, "num_hidden_layers", 1)
    for name in ("hidden_size", "d_model") if small else ():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, _HIDDEN_SIZE)
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.name == "config":
            arguments["config"] = config
        elif "layer" in parameter.name and parameter.default in (parameter.empty, None):
            arguments[parameter.name] = num_layers - 1 if is_last_layer else 0
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**arguments)
