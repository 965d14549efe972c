"""Where a saved model lies: in the folder itself, or inside a run of the lab."""

from pathlib import Path

__all__ = ["model_folder", "suggest_models"]


def model_folder(folder: Path) -> Path:
    """``folder / "model"`` if that holds a saved model, as in a run of the lab; else ``folder``."""
    inside = folder / "model"
    return inside if (inside / "config.json").is_file() else folder


def suggest_models(folder: Path) -> str:
    """For an error message: a sentence that names the models and runs inside ``folder``, "" if there are none."""
    models = [file.parent for file in sorted(folder.glob("*/config.json"))]
    names = ", ".join(map(str, models[:4])) + (f" and {len(models) - 4} more" if models[4:] else "")
    return f" It holds models or runs: give one of {names}." if models else ""
