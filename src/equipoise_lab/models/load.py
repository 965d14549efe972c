"""Loads one Transformers model with routers from this disk, and refuses with a reason what cannot be attached.

Nothing is downloaded, and code that comes with a model is never run.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.find import find_routers
from equipoise.routers.kind import MoELayer
from equipoise_lab.models.folders import model_folder
from equipoise_lab.models.structure import ConfigFile, Structure, build_structure, read_config
from equipoise_lab.models.weights import Weights, find_weights, incomplete_weights

__all__ = ["LoadedModel", "load_model"]

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
_NUM_EXPERTS = re.compile(r"(moe_)?(num|n)_(routed_|local_)?experts")
_K = re.compile(r"(num_)?(experts_per_tok(en)?|top_k_experts|moe_top_?k|moe_k|selected_experts)")


class LoadedModel(NamedTuple):
    """A model from this disk. ``notes`` say what a reader of its figures must know.

    ``zero_experts`` is, by layer, the number of experts that compute nothing. Without weights the model is on the meta
    device.
    """

    model: nn.Module
    config: Any
    folder: Path
    num_parameters: int
    has_weights: bool
    zero_experts: dict[str, int]
    notes: list[str]


def load_model(
    path: Path,
    *,
    max_parameters: float = math.inf,
    dtype: str | None = None,
    require_all_weights: bool = False,
) -> LoadedModel:
    """Loads a model from its folder, a run of the lab, or a config.json.

    Weights are read if they lie beside the config, are floating-point numbers, and if there are at most
    ``max_parameters``. Otherwise the model stays on the meta device, and a note says why. A tensor that no file holds
    is random and noted. With ``require_all_weights``, missing or quantised weights are an error.

    Raises ``UsageError`` if the model cannot be attached: unknown type, own code only, no known router, no weights.
    Raises ``EquipoiseError`` if weights are missing or damaged.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    path = model_folder(path)
    file = read_config(path)
    weights = find_weights(file.folder) if path.is_dir() else Weights([], {}, "only a config.json was given")
    if require_all_weights:
        _refuse_quantisation(file)
        weights.require(file.folder)
    structure = build_structure(file, weights.dtypes)
    model, notes = structure.model, list(structure.notes)
    layers = _find_routers(model, file.path)
    zero_experts = {layer.name: _num_zero_experts(model, layer) for layer in layers}
    notes += _expert_notes(layers, zero_experts, file)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    reason = _why_not_read(file, weights, num_parameters, max_parameters)
    if not reason and weights.num_elements is not None and 2 * weights.num_elements < num_parameters:
        # Transformers would fill the rest with random numbers. A smaller gap is named after loading.
        reason = f"its files hold {weights.num_elements:,} numbers, and the model has {num_parameters:,} parameters"
        if require_all_weights:
            raise incomplete_weights(file.folder, reason)
    if reason:
        notes.append(f"only the structure was read, so there are no counts: {reason}")
        return LoadedModel(model, structure.config, file.folder, num_parameters, False, zero_experts, notes)
    _refuse_integers(layers, weights)
    model, absent = _read_weights(structure, file.folder, dtype)
    if absent:
        reason = f"no file holds {absent[0]}" + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
        if require_all_weights:
            raise incomplete_weights(file.folder, reason)
        notes.append(f"{reason}: random weights are used instead")
    return LoadedModel(model, structure.config, file.folder, num_parameters, True, zero_experts, notes)


# ---- the weights ----


def _refuse_quantisation(file: ConfigFile) -> None:
    if file.quantisation:
        raise UsageError(
            f"MODEL must have floating-point weights: {file.folder} says that they are quantised ({file.quantisation})."
            " Balancing is for training: use the model from before quantisation."
        )


def _why_not_read(file: ConfigFile, weights: Weights, num_parameters: int, max_parameters: float) -> str:
    if file.quantisation:
        return (
            f"its weights are quantised ({file.quantisation}). Balancing is for training: use the model from before "
            "quantisation"
        )
    if num_parameters > max_parameters and weights.files:
        return f"the model has {num_parameters / 1e9:.1f}e9 parameters"
    return weights.reason


def _read_weights(structure: Structure, folder: Path, dtype: str | None) -> tuple[nn.Module, list[str]]:
    """The model with its weights, and the tensors that no file holds: Transformers fills them with random numbers."""
    try:
        model, info = structure.model_class.from_pretrained(
            folder, config=structure.config, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # sizes of another model, or a part of a stack of experts
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise incomplete_weights(folder, f"{type(error).__name__}: {reason}") from None
    return model, sorted(info["missing_keys"])


def _refuse_integers(layers: list[MoELayer], weights: Weights) -> None:
    """Transformers would cast integer weights of a router as if they were floating point."""
    last_names = {layer.name.rpartition(".")[2] for layer in layers}
    for name, dtype in weights.dtypes.items():
        if dtype and last_names & set(name.split(".")[:-1]) and name.endswith("weight") and dtype not in _FLOATS:
            raise UsageError(
                f"a router must have floating-point weights of 16 bits or more: {name} is saved as {dtype}, which is "
                "quantised. Use the model from before quantisation."
            )


# ---- the routers and their experts ----


def _find_routers(model: nn.Module, file: Path) -> list[MoELayer]:
    try:
        if layers := find_routers(model, allow_empty=True):
            return layers
        if not any("expert" in name for name, _ in model.named_modules()):
            raise UsageError(
                f"MODEL must have experts: the {type(model).__name__} of {file} is dense, as no layer has a router or "
                "experts. There is nothing to balance."
            )
        return find_routers(model)
    except EquipoiseError as error:  # here it is the argument that is wrong
        raise UsageError(str(error)) from None


def _num_zero_experts(model: nn.Module, layer: MoELayer) -> int:
    """How many experts of a layer have no weights of their own: they return zero, or their input.

    The weights of the others are stacked in tensors of three dimensions, in the module around the router.
    """
    block = model.get_submodule(layer.name.rpartition(".")[0])
    experts = [module for name, module in block.named_modules() if "expert" in name and "shared" not in name]
    stacks = [tensor for module in experts for tensor in module.parameters(recurse=False) if tensor.dim() == 3]
    return max(layer.num_experts - min(map(len, stacks)), 0) if stacks else 0


def _expert_notes(layers: list[MoELayer], zero_experts: dict[str, int], file: ConfigFile) -> Iterator[str]:
    for num_zero, num_experts in sorted({(zero_experts[layer.name], layer.num_experts) for layer in layers}):
        if num_zero:
            yield (
                f"{num_zero} of the {num_experts} experts of a layer are zero or identity experts, which compute "
                "nothing. They are counted and balanced as the others are"
            )
    built_experts = {layer.num_experts for layer in layers}
    built_experts |= {layer.num_experts - zero_experts[layer.name] for layer in layers}
    for pattern, built, what in (
        (_NUM_EXPERTS, built_experts, "experts"),
        (_K, {layer.k for layer in layers}, "experts a token"),
    ):
        given = list(_numbers(file.content, pattern))
        if given and built.isdisjoint(number for _, number in given):
            says = ", ".join(dict.fromkeys(f"{key}={number}" for key, number in given))
            yield (
                f"config.json has {says}, but {' or '.join(map(str, sorted(built)))} {what} were built from it: it is "
                "another model than the file means"
            )


def _numbers(content: Any, pattern: re.Pattern[str]) -> Iterator[tuple[str, int]]:
    """Keys that match, and their numbers, anywhere in a config."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        yield from _numbers(value, pattern)
        if pattern.fullmatch(key):
            numbers = value if isinstance(value, list) else [value]
            yield from ((key, number) for number in numbers if type(number) is int and number > 0)
