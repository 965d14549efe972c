"""Where a saved model lies: in the folder itself, or inside a run of the lab."""

from pathlib import Path

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.records import read_json

__all__ = ["model_folder", "refuse_run_without_model", "suggest_models"]


def model_folder(folder: Path) -> Path:
    """``folder / "model"`` if that holds a saved model, as in a run of the lab; else ``folder``."""
    inside = folder / "model"
    return inside if (inside / "config.json").is_file() else folder


def refuse_run_without_model(folder: Path) -> None:
    """Raises ``UsageError`` if ``folder`` is a run that saved no model. Any version of the lab may have written it."""
    try:
        config = read_json(folder / "config.json")
    except EquipoiseError:
        return
    if not (folder / "model").is_dir() and isinstance(config, dict) and {"format", "strategy"} <= config.keys():
        path = folder / "audit.json"  # of its last evaluation
        hint = f" What its experts did on its test text is in {path}." if path.exists() else ""
        raise UsageError(
            f"MODEL must be a saved model, or a run that saved one: {folder} is a run without a model. It was trained "
            f"with --no-save-model, or has not finished.{hint}"
        )


def suggest_models(folder: Path) -> str:
    """For an error message: a sentence that names the models and runs inside ``folder``, "" if there are none."""
    models = [file.parent for file in sorted(folder.glob("*/config.json"))]
    names = ", ".join(map(str, models[:4])) + (f" and {len(models) - 4} more" if models[4:] else "")
    return f" It holds models or runs: give one of {names}." if models else ""
