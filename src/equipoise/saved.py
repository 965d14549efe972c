"""The file that keeps biases beside the weights of a model whose family has no slot for them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equipoise.errors import EquipoiseError

__all__ = [
    "BIASES_FILE",
    "frozen_strategy",
    "model_folder",
    "models_in",
    "names_biases",
    "read_biases",
    "saved_beside",
    "write_biases",
]

BIASES_FILE = "equipoise_biases.safetensors"
KEY = "equipoise"  # of config.json: {"equipoise": {"biases": BIASES_FILE}}
MULTIPLIES = "multiplies"  # of the file's metadata: "true" where the choice is by score (1 + bias)


def write_biases(folder: Path, biases: Mapping[str, Tensor], multiplies: bool = False) -> Path:
    """Writes them in float32, and names the file in the folder's config.json, if there is one."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise EquipoiseError("saving biases needs safetensors: pip install safetensors.") from None
    path = folder / BIASES_FILE
    held = {name: value.detach().float().cpu().contiguous() for name, value in biases.items()}
    save_file(held, path, {MULTIPLIES: "true"} if multiplies else None)
    config = folder / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8")) | {KEY: {"biases": BIASES_FILE}}
        aside = folder / ".config.json.tmp"
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(aside, config)
    return path


def read_biases(place: str | os.PathLike[str]) -> tuple[dict[str, Tensor], bool]:
    """By layer, from the file or from the folder that holds it; and whether they multiply."""
    path = Path(place)
    path = path / BIASES_FILE if path.is_dir() else path
    if not path.exists():
        raise EquipoiseError(f"biases must be a mapping or a saved file: {path} does not exist.")
    try:
        from safetensors import safe_open
    except ImportError:
        raise EquipoiseError("reading saved biases needs safetensors: pip install safetensors.") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            biases = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return biases, (opened.metadata() or {}).get(MULTIPLIES) == "true"
    except Exception as error:  # safetensors raises its own
        raise EquipoiseError(f"{path} must be safetensors: {error}. The file is damaged; save it again.") from None


def frozen_strategy(multiplies: bool) -> str:
    """The strategy that routes with such biases and moves nothing."""
    return "frozen:multiplies=true" if multiplies else "frozen"


def names_biases(model: nn.Module) -> bool:
    """Whether the config that the model was loaded with says that biases lie beside the weights."""
    named = getattr(getattr(model, "config", None), KEY, None)
    return isinstance(named, Mapping) and "biases" in named


def saved_beside(model: nn.Module) -> Path | None:
    """The file beside the weights that Transformers loaded the model from; None where it is not found."""
    config: Any = getattr(model, "config", None)
    place = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    path = Path(place) / BIASES_FILE if place else None
    return path if path is not None and path.is_file() else None


def models_in(folder: Path) -> str:
    """A sentence that names the models and runs in a folder that is neither; empty where there are none."""
    inside = [file.parent for file in sorted(folder.glob("*/config.json"))]
    some = ", ".join(map(str, inside[:4])) + (f" and {len(inside) - 4} more" if inside[4:] else "")
    return f" It holds models or runs: give one of {some}." if inside else ""


def model_folder(folder: Path) -> Path:
    """The folder of the saved model: of a run folder of the lab the ``model`` in it, or itself."""
    inside = folder / "model"
    return inside if (inside / "config.json").is_file() else folder
