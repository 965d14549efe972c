"""Builds the model that a config.json describes, without memory for weights, by a class of the installed Transformers.

Code that comes with a model is never run. Where the model that is built may differ from the one that the file means,
a note says so.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from equipoise.errors import UsageError
from equipoise_lab.models.folders import refuse_run_without_model, suggest_models
from equipoise_lab.paths import suggest_paths

__all__ = ["ConfigFile", "Structure", "build_structure", "read_config"]

_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM",
    "AutoModel",
)  # fmt: skip
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # beside config.json
_MTP = re.compile(r"^(?=.*(mtp|nextn))(.*_)?(num|n)_")  # keys that give a number of layers for multi-token prediction


class ConfigFile(NamedTuple):
    """A config.json. ``quantisation`` is how the weights are quantised, "" if they are not."""

    folder: Path
    content: dict[str, Any]
    quantisation: str

    @property
    def path(self) -> Path:
        return self.folder / "config.json"


class Structure(NamedTuple):
    """A model on the meta device. ``notes`` say in what it may differ from the model that the file means."""

    model: Any
    model_class: Any
    config: Any
    notes: list[str]


# ---- the file ----

MAX_CONFIG_BYTES = 2**24  # those of the Hub have some kilobytes


def read_config(path: Path) -> ConfigFile:
    """The config.json at ``path``, a folder or the file itself."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        advice = " A model of the Hub must be downloaded first: hf download NAME --local-dir FOLDER."
        if (path / "adapter_config.json").is_file():
            advice = " It holds an adapter: give its base model, or merge the two and save the result."
        raise UsageError(
            f"MODEL must be a folder with a config.json, or a config.json: {file} does not exist."
            + (suggest_models(path) or ("" if path.exists() else suggest_paths(path)) or advice)
        )
    refuse_run_without_model(file.parent)
    content = _read_json(file)
    if not isinstance(content, dict):
        raise UsageError(f"MODEL must have a config.json of Transformers: {file} holds no JSON object.")
    return ConfigFile(file.parent, content, _quantisation(file.parent, content))


def _read_json(file: Path) -> Any:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES:,} bytes")
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"MODEL must have a {file.name} of Transformers: {file} cannot be read ({error}).") from None


def _quantisation(folder: Path, content: dict[str, Any]) -> str:
    for part in _dicts(content):
        for key in _QUANTISED_KEYS:
            if part.get(key):
                return _method(part[key])
    for name in _QUANTISED_FILES:
        if (folder / name).is_file():
            options = _read_json(folder / name)
            options = options.get("quantization", options) if isinstance(options, dict) else {}
            if options.get("quant_algo", True):  # ModelOpt writes null where only the cache is quantised
                return f"{_method(options)}, {name}"
    return ""


def _method(options: Any) -> str:
    words = [options.get(key) for key in ("quant_method", "quant_algo", "format")] if isinstance(options, dict) else []
    return " ".join(str(word) for word in words if word) or "some method"


def _dicts(content: Any) -> Iterator[dict[str, Any]]:
    """A dictionary and all dictionaries in it."""
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from _dicts(value)


# ---- the model ----


def build_structure(file: ConfigFile, tensor_names: Iterable[str] = ()) -> Structure:
    """The model of a config file on the meta device. ``tensor_names`` are those of its weights, as far as known.

    Raises ``UsageError`` if the installed Transformers has no class for it, or cannot build one from this file.
    """
    notes: list[str] = []
    config_class, content = _config_class(file, notes)
    content = _drop_unread_parts(config_class, content, notes)
    config = _build(config_class.__name__, lambda: config_class.from_dict(content), file)
    model_class, part = _model_class(config, file, notes)
    _use_plain_attention(part)
    with torch.device("meta"):
        model: nn.Module = _build(model_class.__name__, lambda: model_class._from_config(part), file)
    if file.content.get("auto_map"):
        notes.append(
            f"config.json brings code of its own (auto_map), which was not run: {model_class.__name__} of Transformers "
            "was built instead"
        )
    notes += _unread_values(config, content)
    notes += _mtp_notes(model, file.content, tensor_names)
    return Structure(model, model_class, part, notes)


def _use_plain_attention(config: Any) -> None:
    """Routers do not depend on the attention, whose kernels may not be installed."""
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "_attn_implementation"))):
        part._attn_implementation = "eager"


def _build(class_name: str, build: Callable[[], Any], file: ConfigFile) -> Any:
    try:
        return build()
    except Exception as error:  # Transformers raises anything on a config that it does not understand
        reason = " ".join(str(error).split())[:300].rstrip(".")
        own_code = " The file may be meant for the code that it brings (auto_map)." * bool(file.content.get("auto_map"))
        raise UsageError(
            f"MODEL must have a config from which its model can be built: {class_name} fails with "
            f"{type(error).__name__}: {reason}.{own_code}"
        ) from None


def _config_class(file: ConfigFile, notes: list[str]) -> tuple[Any, dict[str, Any]]:
    """The config class, and what it is to read: without own code, and without what concerns quantised weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = _without_keys(file.content, {*_QUANTISED_KEYS, "auto_map"})
    model_type = content.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type], content
    architecture = _named_class(content)
    if architecture is not None:
        config_class = architecture.config_class
        says = f"model_type {model_type}, which the installed Transformers does not know" if model_type else ""
        notes.append(
            f"config.json has {says or 'no model_type'}: it was read by its architecture {architecture.__name__}, as "
            f"{config_class.model_type}. AutoModel would refuse it"
        )
        return config_class, content | {"model_type": config_class.model_type}
    if not isinstance(model_type, str):
        raise UsageError(f"MODEL must have a config.json of Transformers: {file.path} has no model_type.")
    if file.content.get("auto_map"):
        raise UsageError(
            f"MODEL must be a model of Transformers itself: {file.path} has an auto_map, and the installed "
            f"Transformers has no class for {model_type}. So it needs its own code, which is not run here. Load the "
            "model yourself and call equipoise.attach(model)."
        )
    raise UsageError(
        f"MODEL must be of a type that the installed Transformers knows: {file.path} says {model_type}. `equipoise "
        "families` lists the types with experts. A newer Transformers may know more."
    )


def _without_keys(content: Any, keys: set[str]) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _without_keys(value, keys) for key, value in content.items() if key not in keys}


def _architectures(content: dict[str, Any]) -> list[str]:
    names = content.get("architectures") or ()
    return [name for name in ([names] if isinstance(names, str) else names) if isinstance(name, str)]


def _named_class(content: dict[str, Any]) -> Any:
    """The first model class of Transformers that ``architectures`` names, or None."""
    import transformers

    for name in _architectures(content):
        cls = getattr(transformers, name, None) if name.isidentifier() else None
        is_model = inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)
        if is_model and getattr(cls, "config_class", None) is not None:
            return cls
    return None


def _model_class(config: Any, file: ConfigFile, notes: list[str]) -> tuple[Any, Any]:
    """The class that the file names if it belongs to the config or a part of it, else the one of AutoModel.

    With it, the config or the part from which it is built.
    """
    import transformers

    named = _named_class(file.content)
    for part, _ in _parts(config):
        if named is not None and type(part) is named.config_class:
            return named, part
    names = _architectures(file.content)
    for auto_class in (getattr(transformers, name) for name in _AUTO_CLASSES if hasattr(transformers, name)):
        if type(config) in auto_class._model_mapping:
            classes = auto_class._model_mapping[type(config)]
            model_class = classes if inspect.isclass(classes) else classes[0]
            if names:
                why = "the installed Transformers does not have" if named is None else "belongs to another model_type"
                notes.append(
                    f"config.json names {', '.join(names)} in architectures, which {why}: {model_class.__name__}, the "
                    f"class of AutoModel for {config.model_type}, was built instead and may be another model"
                )
            is_of_part = (part for part, _ in _parts(config) if type(part) is model_class.config_class)
            return model_class, next(is_of_part, config)
    raise UsageError(
        f"MODEL must be of a type for which Transformers has a model: {config.model_type} is the config of a part, or "
        "of a model that brings its own code. Give the config of a whole model of Transformers."
    )


# ---- notes ----


def _parts(config: Any, content: Any = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A config and all configs inside it, each with what the file gives for it."""
    content = content if isinstance(content, dict) else {}
    yield config, content
    for name in config.sub_configs:
        if hasattr(part := getattr(config, name, None), "sub_configs"):
            yield from _parts(part, content.get(name))


def _drop_unread_parts(config_class: Any, content: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The content without the nested configs that the class never mentions; a note names them."""
    reads = (*inspect.signature(config_class.__init__).parameters, inspect.getsource(config_class))
    nested = [key for key, value in content.items() if key.endswith("_config") and isinstance(value, dict)]
    unread = [key for key in nested if not any(key in text for text in reads)]
    if unread:
        notes.append(
            f"config.json has {', '.join(unread)}, which {config_class.__name__} does not read: what it describes was "
            "not built"
        )
    return {key: value for key, value in content.items() if key not in unread}


def _unread_values(config: Any, content: dict[str, Any]) -> Iterator[str]:
    """What the file gives at its top although only a part of the config reads it, and reads another value."""
    text = config.get_text_config()
    parts = sorted(_parts(config, content), key=lambda part: part[0] is not text)
    unread, used = [], []
    for key, value in content.items():
        if key in _fields(type(config)) or key.endswith("_token_id"):
            continue
        part, given_for_part = next((part for part in parts if key in _fields(type(part[0]))), (None, {}))
        if part is None or key in given_for_part or (read := _plain(getattr(part, key, None))) == value:
            continue
        unread.append(f"{key}={value}")
        used.append(f"{key}={read}")
    if unread:
        yield (
            f"config.json gives {', '.join(unread)} at its top, where {type(config).__name__} does not look: the model "
            f"was built with {', '.join(used)}, so it may be another"
        )


def _fields(config_class: type) -> set[str]:
    """The names that only this config class reads, without those that every config has."""
    from transformers import PretrainedConfig

    parameters = inspect.signature(config_class.__init__).parameters.keys()  # type: ignore[misc]
    common = inspect.signature(PretrainedConfig.__init__).parameters.keys()
    aliases = getattr(config_class, "attribute_map", {})
    return {*parameters, *aliases} - {*common, "kwargs", "use_cache", "initializer_range"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _mtp_notes(model: nn.Module, content: dict[str, Any], tensor_names: Iterable[str]) -> Iterator[str]:
    """Layers for multi-token prediction are in the file, but not in the model."""
    if any(re.search(r"mtp|nextn", name) for name, _ in model.named_modules()):
        return
    says = [
        f"{key}={value}"
        for part in _dicts(content)
        for key, value in part.items()
        if _MTP.match(key) and type(value) is int and value > 0
    ]
    if says:
        source = f"config.json has {', '.join(dict.fromkeys(says))}"
    elif tensor := next((name for name in tensor_names if re.search(r"(^|\.)(mtp|nextn)", name)), ""):
        source = f"the weights hold {tensor}"
    else:
        return
    yield (
        f"{source}: layers for multi-token prediction, which are not in Transformers' model. Their routers are neither "
        "counted nor balanced"
    )
