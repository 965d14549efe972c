"""Which files hold the weights of a model, and what is missing. Reads names and headers only, so it costs no memory."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from equipoise.errors import EquipoiseError, UsageError

__all__ = ["NO_WEIGHTS", "Weights", "find_weights", "incomplete_weights"]

NO_WEIGHTS = "there is no model.safetensors, no pytorch_model.bin and no index of either"  # and nothing like weights
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
_TENSOR_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".distcp"))
_NOT_WEIGHTS = ("equipoise", "training_args", "optimizer", "scheduler", "rng_state")  # how names of such files begin
_LFS_POINTER = b"version https://git-lfs"


class Weights(NamedTuple):
    """The weights beside a config.

    ``files`` is empty if there are none, or if they cannot be read; ``reason`` then says why. ``dtypes`` holds the
    dtype, as safetensors calls it, of every tensor whose name is known; "" if only its name is. ``num_elements`` is
    the number of elements of all tensors, None if it is not known.
    """

    files: list[Path]
    dtypes: dict[str, str]
    reason: str = ""
    are_incomplete: bool = False  # a part is missing or damaged
    num_elements: int | None = None

    def require(self, folder: Path) -> None:
        """Raises an error that says what is missing."""
        if self.are_incomplete:
            raise incomplete_weights(folder, self.reason)
        if not self.files:
            raise UsageError(
                f"MODEL must have weights: {folder} has none: {self.reason}. Give the folder of a saved model."
            )


def incomplete_weights(folder: Path, reason: str) -> EquipoiseError:
    return EquipoiseError(f"MODEL must have all of its weights: {folder}: {reason}. Copy the folder again.")


def find_weights(folder: Path) -> Weights:
    """The files from which Transformers reads the weights in ``folder``. An index of shards must be complete."""
    if (folder / "adapter_config.json").is_file():
        return Weights(
            [],
            {},
            "it holds an adapter (adapter_config.json), which Transformers would put on the model. Merge it first "
            "(merge_and_unload, then save_pretrained), or remove it",
        )
    from safetensors import safe_open

    # the order in which Transformers looks: it does not read an index beside a whole file
    candidates = (folder / name for whole in _WHOLE_FILES for name in (whole, f"{whole}.index.json"))
    first = next((file for file in candidates if file.is_file()), None)
    if first is None:
        return _without_known_file(folder)
    names: list[str] = []
    files = [first]
    if first.suffix == ".json":
        try:
            weight_map = json.loads(first.read_text(encoding="utf-8"))["weight_map"]
            names, shards = list(weight_map), sorted(set(weight_map.values()))
            files = [folder / shard for shard in shards]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            return _incomplete(f"{first.name} is damaged ({type(error).__name__}: {error})")
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            missing = f"{absent[0]} {_and_more(absent)} missing" if absent else "none is named"
            return _incomplete(f"{first.name} lists {len(files)} files, and {missing}", names)
    dtypes = dict.fromkeys(names, "")
    num_elements = 0
    for file in files:
        if reason := _unreadable(file):
            return _incomplete(f"{file.name} is {reason}", names)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        tensor = tensors.get_slice(name)
                        dtypes[name] = str(tensor.get_dtype())
                        num_elements += math.prod(tensor.get_shape())
            except Exception as error:  # safetensors raises its own
                return _incomplete(f"{file.name} is damaged ({type(error).__name__}: {error})", names)
    is_known = first.name.startswith("model.safetensors")
    return Weights(files, dtypes, num_elements=num_elements if is_known else None)


def _incomplete(reason: str, names: list[str] | None = None) -> Weights:
    return Weights([], dict.fromkeys(names or (), ""), reason, are_incomplete=True)


def _without_known_file(folder: Path) -> Weights:
    others = [
        file.name
        for file in sorted(folder.glob("*"))
        if file.suffix in _TENSOR_SUFFIXES and not file.name.startswith(_NOT_WEIGHTS)
    ]
    for whole in map(Path, _WHOLE_FILES):
        shards = [name for name in others if name.startswith(f"{whole.stem}-") and name.endswith(whole.suffix)]
        if shards:
            return _incomplete(f"{whole}.index.json is missing beside {shards[0]} {_and_more(shards, '')}".rstrip())
    reason = NO_WEIGHTS
    if others:
        reason += f", only {others[0]} {_and_more(others, '')}".rstrip() + ", which Transformers does not read here"
    return Weights([], {}, reason)


def _and_more(names: list[str], verb: str = "is") -> str:
    """What follows the first of ``names``: "is" or "and 3 more are"; without a verb "" or "and 3 more"."""
    if len(names) == 1:
        return verb
    return f"and {len(names) - 1} more" + (" are" if verb else "")


def _unreadable(file: Path) -> str:
    """Why no tensor can be in the file; "" if there may be some."""
    with file.open("rb") as content:
        start = content.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return "a pointer of Git LFS without the file itself, which `git lfs pull` fetches"
    return "" if start else "empty"
