"""What ``attach`` makes of one model on this disk: its layers, how they select, and the counts of a random batch."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from equipoise.attachment import attach
from equipoise.errors import EquipoiseError, UsageError
from equipoise.metrics import max_violation
from equipoise.routers.find import FoundRouter, find_routers, hash_routers, unknown_routers
from equipoise.saved import BIASES_FILE, model_folder, models_in, names_biases

__all__ = ["Examined", "ExaminedLayer", "Opened", "examine", "open_model"]

LARGE = 2_000_000_000  # parameters from which on a model is not filled
TOKENS = (4, 64)

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
_SAVED = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class ExaminedLayer:
    """One router. Without a batch there is no load and no MaxVio."""

    name: str
    num_experts: int
    k: int
    score_function: str
    selection: str
    slot: str | None
    load: list[int] | None
    maxvio: float | None


@dataclass(frozen=True)
class Examined:
    """A model that ``attach`` took."""

    model: str  # its class
    model_type: str
    num_parameters: int
    weights: str  # "loaded", "random" or "none"
    layers: list[ExaminedLayer]
    notes: list[str]


class Opened(NamedTuple):
    """A model on this disk."""

    model: nn.Module
    config: Any
    folder: Path
    num_parameters: int
    weights: str  # "loaded", "random" or "none"
    notes: list[str]


def examine(path: Path) -> Examined:
    """Builds a model of Transformers from its folder or its config.json, attaches, and runs one random batch.

    Raises ``UsageError`` where it cannot be attached, and says why: a type that is not known, code of its own, weights
    that are quantised, no router, or none that is known.
    """
    opened = open_model(path, most_parameters=LARGE)
    beside = opened.folder / BIASES_FILE
    if names_biases(opened.model) and not beside.is_file():
        opened.notes.append(
            f"config.json names {BIASES_FILE}, which is not beside it: attach refuses a strategy with biases until "
            "it is copied back, or biases=... is given"
        )
    elif beside.is_file() and opened.weights == "loaded":
        opened.notes.append(f"the batch was routed without the biases of {BIASES_FILE}")
    return _attached(opened.model, opened.config, opened.num_parameters, opened.weights, opened.notes)


def open_model(
    path: Path, *, most_parameters: float = math.inf, dtype: str | None = None, whole: bool = False
) -> Opened:
    """A model of Transformers with a router that is known: with the weights that lie beside its config, or random ones;
    of more than ``most_parameters`` without any. Weights that no file holds are random and noted, or, ``whole``, an
    error. Raises as ``examine``."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    path = model_folder(path)
    folder, content = _read(path)
    config_class = transformers.CONFIG_MAPPING[content["model_type"]]
    config = _made("it", lambda: config_class.from_dict(content))
    auto = _class(config, content)
    with torch.device("meta"):
        model = _made(auto.__name__, lambda: auto._from_config(config))
    routers = _found(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    saved = [file for pattern in _SAVED for file in folder.glob(pattern)] if path.is_dir() else []
    weights, notes = "none", []
    if num_parameters > most_parameters:
        notes.append(
            f"with {num_parameters / 1e9:.1f}e9 parameters it was built without weights and no batch was run: no counts"
        )
    elif saved:
        _refuse_missing_files(folder)
        _refuse_quantised(routers, folder, saved)
        model, info = _loaded(
            folder,
            lambda: auto.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True),
        )
        weights = "loaded"
        if absent := sorted(info["missing_keys"]):
            which = absent[0] + (f" and {len(absent) - 1} more are" if len(absent) > 1 else " is")
            if whole:
                raise _incomplete(folder, f"{which} in none of its files")
            notes.append(f"{which} in none of its files: random weights are in their place")
    else:
        model, weights = _made(auto.__name__, lambda: auto._from_config(config)), "random"
        notes.append("there are no weights, so they are random: the counts say nothing of a trained model")
    return Opened(model, config, folder, num_parameters, weights, notes)


def _incomplete(folder: Path, reason: str) -> EquipoiseError:
    return EquipoiseError(f"MODEL must have all of its weights: {folder}: {reason}. Copy the folder again.")


def _refuse_missing_files(folder: Path) -> None:
    """What the index names must be there, and Transformers does not say which is not."""
    weights = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]  # as Transformers looks for them
    there = (file for one in weights for file in (one, Path(f"{one}.index.json")) if file.is_file())
    found = next(there, None)
    if found is None or found in weights:
        return
    try:
        names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _incomplete(folder, f"{found.name} is damaged ({type(error).__name__}: {error})") from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        which = absent[0] + (f" and {len(absent) - 1} more are" if len(absent) > 1 else " is")
        raise _incomplete(folder, f"of the {len(names)} files that {found.name} names, {which} not there")


def _loaded(folder: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a file that is torn, sizes of another model
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise _incomplete(folder, f"{type(error).__name__}: {reason}") from None


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"MODEL must be a folder with a config.json, or a config.json: {file} is not there."
            + (models_in(path) or " A model of the Hub must be downloaded first: hf download NAME --local-dir FOLDER.")
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
            f"MODEL must be a model of Transformers itself: {file} has an auto_map, so {model_type} is code of its "
            "own, which is not run here. Load it yourself and call equipoise.attach(model), which says what it finds; "
            "if you load the class that Transformers has of this type, take auto_map out of the config."
        )
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"MODEL must be of a type that the installed Transformers knows: {file} says {model_type}. `equipoise "
            "families` lists those with experts; a newer Transformers may know more."
        )
    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method", "some method")
        raise UsageError(
            f"MODEL must have weights in floating point: {file} says that they are quantised ({method}). Balancing is "
            "for training; take the model before it was quantised."
        )
    return file.parent, content


def _class(config: Any, content: dict[str, Any]) -> Any:
    """The class that the config names, or the fitting one of its type."""
    import transformers

    for name in content.get("architectures") or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    autos = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")
    for auto in (getattr(transformers, name) for name in autos):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise UsageError(
        f"MODEL must be of a type that Transformers has a model of: {config.model_type} is the config of a part. Give "
        "the config of the whole model."
    )


def _made(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        raise UsageError(
            f"MODEL must be a config that its model can be built from: {what} fails with "
            f"{type(error).__name__}: {error}."
        ) from None


def _found(model: nn.Module) -> list[FoundRouter]:
    try:
        return find_routers(model)
    except EquipoiseError as error:
        raise UsageError(str(error)) from None


def _refuse_quantised(routers: list[FoundRouter], folder: Path, saved: list[Path]) -> None:
    """Weights that are not floating point would be cast on loading as if they were."""
    ends = {router.name.rpartition(".")[2] for router in routers}
    for name, dtype in _saved_dtypes(folder, saved):
        if ends & set(name.split(".")[:-1]) and name.endswith("weight") and dtype not in _FLOATS:
            raise UsageError(
                f"a router must have weights in floating point of 16 bits or more: {name} is saved as {dtype}. It is "
                "quantised; take the model before it was."
            )


def _saved_dtypes(folder: Path, saved: list[Path]) -> Iterator[tuple[str, str]]:
    from safetensors import safe_open

    for file in saved:
        if file.suffix == ".safetensors" and not file.name.startswith("equipoise"):
            try:
                with safe_open(file, framework="pt") as tensors:
                    dtypes = [(name, str(tensors.get_slice(name).get_dtype())) for name in tensors.keys()]  # noqa: SIM118
            except Exception as error:  # safetensors raises its own
                raise _incomplete(folder, f"{file.name} is damaged ({type(error).__name__}: {error})") from None
            yield from dtypes


def _attached(model: nn.Module, config: Any, num_parameters: int, weights: str, notes: list[str]) -> Examined:
    log = logging.getLogger("equipoise")
    level = log.level
    log.setLevel(logging.ERROR)  # what attach would warn of is said in the notes
    try:
        routers = _found(model)
        balance = attach(model)
        notes += [f"{name} is neither counted nor balanced" for name in unknown_routers(model)]
        notes += [f"{name} is a hash layer: neither counted nor balanced" for name in hash_routers(model)]
    finally:
        log.setLevel(level)
    load: dict[str, torch.Tensor] = {}
    if weights != "none":
        try:
            with torch.no_grad(), balance.measuring() as load:
                model.eval()(**_batch(model, config))
        except Exception as error:
            raise EquipoiseError(
                f"the model must run on token ids alone: {type(model).__name__} says {type(error).__name__}: {error}. "
                f"It can be attached ({len(routers)} routers were found); only the batch of random tokens did not run."
            ) from None
    layers = [
        ExaminedLayer(
            router.name,
            router.num_experts,
            router.k,
            router.kind.score_function,
            router.kind.selection,
            router.kind.slot,
            load[router.name].tolist() if load else None,
            float(max_violation(load[router.name])) if load and load[router.name].any() else None,
        )
        for router in routers
    ]
    return Examined(type(model).__name__, config.model_type, num_parameters, weights, layers, notes)


def _batch(model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    text = config.get_text_config()
    ids = torch.randint(text.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    longest = getattr(text, "max_position_embeddings", None) or TOKENS[1]
    ids = ids[:, :longest]
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
