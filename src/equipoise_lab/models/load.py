"""Loads one Transformers model with routers from this disk, and refuses with a reason what cannot be attached.

Nothing is downloaded, and code that comes with a model is never run.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.find import find_routers
from equipoise.routers.kind import MoELayer
from equipoise_lab.models.folders import model_folder, suggest_models

__all__ = ["LoadedModel", "load_model"]

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


class LoadedModel(NamedTuple):
    """A model from this disk. ``notes`` say what a reader of its figures must know."""

    model: nn.Module
    config: Any
    folder: Path
    num_parameters: int
    weights: str  # "loaded", "random" or "none"
    notes: list[str]


def load_model(
    path: Path,
    *,
    max_parameters: float = math.inf,
    dtype: str | None = None,
    require_all_weights: bool = False,
) -> LoadedModel:
    """Loads a model from its folder, a run of the lab, or a config.json.

    Weights are read if they lie beside the config; without any they are random. A model of more than ``max_parameters``
    stays on the meta device, without weights. If no file holds a tensor, it is random and noted, or, with
    ``require_all_weights``, an error.

    Raises ``UsageError`` if the model cannot be attached: unknown type, own code, quantised weights, no known router.
    Raises ``EquipoiseError`` if weights are missing or damaged.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    path = model_folder(path)
    folder, content = _read_config(path)
    config_class = transformers.CONFIG_MAPPING[content["model_type"]]
    config = _build(config_class.__name__, lambda: config_class.from_dict(content))
    model_class = _model_class(config, content)
    with torch.device("meta"):
        model = _build(model_class.__name__, lambda: model_class._from_config(config))
    layers = _find_routers(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    files = [file for pattern in _WEIGHT_FILES for file in folder.glob(pattern)] if path.is_dir() else []
    weights, notes = "none", []
    if num_parameters > max_parameters:
        notes.append(
            f"with {num_parameters / 1e9:.1f}e9 parameters the model was built without weights and no batch was run: "
            "there are no counts"
        )
    elif files:
        _refuse_missing_files(folder)
        _refuse_quantised(layers, folder, files)
        model, info = _read_weights(
            folder,
            lambda: model_class.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True),
        )
        weights = "loaded"
        if absent := sorted(info["missing_keys"]):
            names = absent[0] + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            if require_all_weights:
                raise _incomplete(folder, f"no file holds {names}")
            notes.append(f"no file holds {names}: random weights are used instead")
    else:
        model, weights = _build(model_class.__name__, lambda: model_class._from_config(config)), "random"
        notes.append("there are no weights, so random ones are used: the counts say nothing about a trained model")
    return LoadedModel(model, config, folder, num_parameters, weights, notes)


# ---- the config ----


def _read_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of its config.json; refuses what cannot be built from it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"MODEL must be a folder with a config.json, or a config.json: {file} does not exist."
            + (
                suggest_models(path)
                or " A model of the Hub must be downloaded first: hf download NAME --local-dir FOLDER."
            )
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"MODEL must have a config.json of Transformers: {file} cannot be read ({error}).") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UsageError(f"MODEL must have a config.json of Transformers: {file} has no model_type.")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = content["model_type"]
    if content.get("auto_map"):
        raise UsageError(
            f"MODEL must be a model of Transformers itself: {file} has an auto_map, so {model_type} brings its own "
            "code, which is not run here. Load the model yourself and call equipoise.attach(model). If Transformers "
            "has a class for this type, you can remove auto_map from the config instead."
        )
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"MODEL must be of a type that the installed Transformers knows: {file} says {model_type}. `equipoise "
            "families` lists the types with experts. A newer Transformers may know more."
        )
    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method", "some method")
        raise UsageError(
            f"MODEL must have floating-point weights: {file} says that they are quantised ({method}). Balancing is for "
            "training: use the model from before quantisation."
        )
    return file.parent, content


def _model_class(config: Any, content: dict[str, Any]) -> Any:
    """The class that the config names, or else the first auto class that knows its type."""
    import transformers

    for name in content.get("architectures") or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    auto_classes = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")
    for auto_class in (getattr(transformers, name) for name in auto_classes):
        if type(config) in auto_class._model_mapping:
            return auto_class._model_mapping[type(config)]
    raise UsageError(
        f"MODEL must be of a type for which Transformers has a model: {config.model_type} is the config of a part. "
        "Give the config of the whole model."
    )


def _build(class_name: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:
        raise UsageError(
            f"MODEL must have a config from which its model can be built: {class_name} fails with "
            f"{type(error).__name__}: {error}."
        ) from None


def _find_routers(model: nn.Module) -> list[MoELayer]:
    try:
        return find_routers(model)
    except EquipoiseError as error:  # here it is the argument that is wrong
        raise UsageError(str(error)) from None


# ---- the weights ----


def _incomplete(folder: Path, reason: str) -> EquipoiseError:
    return EquipoiseError(f"MODEL must have all of its weights: {folder}: {reason}. Copy the folder again.")


def _refuse_missing_files(folder: Path) -> None:
    """Every file that the index lists must exist. Transformers does not say which one is missing."""
    whole_files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    # the order in which Transformers looks: it does not read an index beside a whole file
    candidates = (file for whole in whole_files for file in (whole, Path(f"{whole}.index.json")))
    index = next((file for file in candidates if file.is_file()), None)
    if index is None or index in whole_files:
        return
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _incomplete(folder, f"{index.name} is damaged ({type(error).__name__}: {error})") from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        missing = absent[0] + (f" and {len(absent) - 1} more are" if len(absent) > 1 else " is")
        raise _incomplete(folder, f"{index.name} lists {len(names)} files, and {missing} missing")


def _read_weights(folder: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # a torn file, or sizes of another model
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise _incomplete(folder, f"{type(error).__name__}: {reason}") from None


def _refuse_quantised(layers: list[MoELayer], folder: Path, files: list[Path]) -> None:
    """Transformers would cast integer weights of a router as if they were floating point."""
    last_names = {layer.name.rpartition(".")[2] for layer in layers}
    for name, dtype in _saved_dtypes(folder, files):
        if last_names & set(name.split(".")[:-1]) and name.endswith("weight") and dtype not in _FLOATS:
            raise UsageError(
                f"a router must have floating-point weights of 16 bits or more: {name} is saved as {dtype}, which is "
                "quantised. Use the model from before quantisation."
            )


def _saved_dtypes(folder: Path, files: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and dtype of every tensor in the safetensors files, but not of our biases."""
    from safetensors import safe_open

    for file in files:
        if file.suffix == ".safetensors" and not file.name.startswith("equipoise"):
            try:
                with safe_open(file, framework="pt") as tensors:
                    dtypes = [(name, str(tensors.get_slice(name).get_dtype())) for name in tensors.keys()]  # noqa: SIM118
            except Exception as error:  # safetensors raises its own
                raise _incomplete(folder, f"{file.name} is damaged ({type(error).__name__}: {error})") from None
            yield from dtypes
