"""The file that stores biases beside the weights of a model without slots for them."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equipoise.errors import EquipoiseError, UsageError

__all__ = [
    "BIASES_FILE",
    "LayerBiases",
    "check_saved_model",
    "frozen_strategy",
    "holds_adapter",
    "names_biases",
    "read_biases",
    "saved_beside",
    "write_biases",
]

BIASES_FILE = "equipoise_biases.safetensors"
KEY = "equipoise"  # in config.json: {"equipoise": {"biases": BIASES_FILE}}
MULTIPLIES = "multiplies"  # in the file's metadata: "true" if the choice is by score * (1 + bias)


class LayerBiases(dict[str, Tensor]):
    """Biases by layer, as a ``Balance`` gives them. ``multiplies``: a bias b is a factor 1 + b on the scores."""

    def __init__(self, biases: Mapping[str, Tensor], multiplies: bool):
        super().__init__(biases)
        self.multiplies = multiplies

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (list(self.items()),)  # what torch.load takes with weights_only


def write_biases(folder: Path, biases: Mapping[str, Tensor], multiplies: bool = False) -> Path:
    """Writes the biases in float32 and names the file in the folder's config.json, if there is one."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise EquipoiseError("saving biases needs safetensors: pip install safetensors.") from None
    path = folder / BIASES_FILE
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in biases.items()}
    save_file(tensors, path, {MULTIPLIES: "true"} if multiplies else None)
    config = folder / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8")) | {KEY: {"biases": BIASES_FILE}}
        temporary = folder / ".config.json.tmp"
        text = json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, config)
    return path


def check_saved_model(folder: Path, needs_config: bool) -> None:
    """Raises ``UsageError`` if ``folder`` is none or, with ``needs_config``, has no config of a model or an adapter."""
    has_config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not folder.is_dir() or (needs_config and not has_config):
        raise UsageError(
            f"folder must be one that the model was saved into: {folder} is none. Save the model first, as with "
            "model.save_pretrained(folder), which writes the config.json that names the biases."
        )


def holds_adapter(folder: Path) -> bool:
    """Whether PEFT saved an adapter there, without the model and its slots."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def read_biases(location: str | os.PathLike[str]) -> tuple[dict[str, Tensor], bool]:
    """The biases by layer, from the file or its folder, and whether they multiply the scores."""
    path = Path(location)
    path = path / BIASES_FILE if path.is_dir() else path
    if not path.exists():
        raise EquipoiseError(f"biases must be a mapping or a saved file: {path} does not exist. Check the path.")
    try:
        from safetensors import safe_open
    except ImportError:
        raise EquipoiseError("reading saved biases needs safetensors: pip install safetensors.") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            biases = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return biases, (opened.metadata() or {}).get(MULTIPLIES) == "true"
    except Exception as error:  # safetensors has errors of its own
        raise EquipoiseError(
            f"{path} must be a file that save_biases wrote: {error}. If torch.save wrote it, load it and pass what "
            "torch.load returns; else it is damaged: save it again."
        ) from None


def frozen_strategy(multiplies: bool) -> str:
    """The strategy that routes with saved biases and never moves them."""
    return "frozen:multiplies=true" if multiplies else "frozen"


def names_biases(model: nn.Module) -> bool:
    """Whether the model's config says that biases were saved beside the weights."""
    entry = getattr(getattr(model, "config", None), KEY, None)
    return isinstance(entry, Mapping) and "biases" in entry


def saved_beside(model: nn.Module) -> Path | None:
    """The biases file beside the weights that Transformers loaded, or None if there is none."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    path = Path(folder) / BIASES_FILE if folder else None
    return path if path is not None and path.is_file() else None
