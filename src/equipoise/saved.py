"""The file that keeps offsets beside the weights of a model whose family has no slot for them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equipoise.errors import EquipoiseError

__all__ = ["OFFSETS_FILE", "model_folder", "names_offsets", "read_offsets", "saved_beside", "write_offsets"]

OFFSETS_FILE = "equipoise_offsets.safetensors"
KEY = "equipoise"  # of config.json: {"equipoise": {"offsets": OFFSETS_FILE}}


def write_offsets(folder: Path, offsets: Mapping[str, Tensor]) -> Path:
    """Writes them in float32, and names the file in the folder's config.json, if there is one."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise EquipoiseError("saving offsets needs safetensors: pip install safetensors.") from None
    path = folder / OFFSETS_FILE
    save_file({name: value.detach().float().cpu().contiguous() for name, value in offsets.items()}, path)
    config = folder / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8")) | {KEY: {"offsets": OFFSETS_FILE}}
        aside = folder / ".config.json.tmp"
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(aside, config)
    return path


def read_offsets(place: str | os.PathLike[str]) -> dict[str, Tensor]:
    """By layer, from the file or from the folder that holds it."""
    path = Path(place)
    path = path / OFFSETS_FILE if path.is_dir() else path
    if not path.exists():
        raise EquipoiseError(f"offsets must be a mapping or a saved file: {path} does not exist.")
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise EquipoiseError("reading saved offsets needs safetensors: pip install safetensors.") from None
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own
        raise EquipoiseError(f"{path} must be safetensors: {error}. The file is damaged; save it again.") from None


def names_offsets(model: nn.Module) -> bool:
    """Whether the config that the model was loaded with says that offsets lie beside the weights."""
    named = getattr(getattr(model, "config", None), KEY, None)
    return isinstance(named, Mapping) and "offsets" in named


def saved_beside(model: nn.Module) -> Path | None:
    """The file beside the weights that Transformers loaded the model from; None where it is not found."""
    config: Any = getattr(model, "config", None)
    place = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    path = Path(place) / OFFSETS_FILE if place else None
    return path if path is not None and path.is_file() else None


def model_folder(folder: Path) -> Path:
    """The folder of the saved model: of a run folder of the lab the ``model`` in it, or itself."""
    inside = folder / "model"
    return inside if (inside / "config.json").is_file() else folder
