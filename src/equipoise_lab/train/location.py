"""Where a text is: the packaged corpus, a file or folder here, or a data set of the Hub. Imports little."""

import os
import re
from pathlib import Path
from typing import Any

from equipoise.errors import UsageError
from equipoise_lab.paths import suggest_paths

__all__ = [
    "CORPUS",
    "PACKAGED",
    "PLACES",
    "check_location",
    "find_tokenizer",
    "hub_name",
    "is_same_place",
    "local_path",
    "note_on_packaged",
]

CORPUS = Path(__file__).parents[1] / "corpus"
PACKAGED = "corpus"  # its name for --data
HUB = "hf:"  # before the name of a data set of the Hub
PLACES = ("data", "model", "tokenizer")  # options that name a file or a folder, which is there before the run
HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?"


def local_path(data: str | Path | None) -> Path:
    """The file or folder that ``data`` names; for ``"corpus"`` and None the packaged corpus."""
    return CORPUS if data is None or data == PACKAGED else Path(data).expanduser()


def note_on_packaged(data: str | Path | None) -> str | None:
    """A note if ``data`` is the packaged corpus and a file or folder here has the same name."""
    if data != PACKAGED or not Path(PACKAGED).exists():
        return None
    return f"the text is the packaged {PACKAGED}; for the one in the current folder, write --data ./{PACKAGED}"


def hub_name(data: str | Path | None) -> str | None:
    """The name of the data set of the Hub, None if ``data`` is local."""
    is_local = not isinstance(data, str) or not data.startswith(HUB) or Path(data).exists()
    return None if is_local else str(data).removeprefix(HUB)


def check_location(data: str | Path | None) -> None:
    """Raises ``UsageError`` if there is no such text here. Of a data set of the Hub it checks only the name's form."""
    name, path = hub_name(data), local_path(data)
    if name is not None:
        if not re.fullmatch(HUB_NAME, name):
            raise UsageError(f"A data set of the Hub must be {HUB}NAME or {HUB}OWNER/NAME: got {data}.")
    elif not path.exists():
        hub = f" A data set of the Hugging Face Hub is written {HUB}{data}." if _looks_like_hub(str(data)) else ""
        raise UsageError(
            f"The text must be {PACKAGED}, a folder, a file, or {HUB}NAME: {path} does not exist here."
            f"{suggest_paths(path, [PACKAGED]) or ' Check the path.'}{hub}"
        )


def is_same_place(recorded: Any, other: Any) -> bool:
    """Whether two values of an option may name the same file or folder, one of them relative to another folder.

    Of a run that goes on, the text and the weights are compared too.

    >>> is_same_place("my_text", "/home/me/my_text"), is_same_place("my_text", "/home/me/text")
    (True, False)
    >>> is_same_place("../my_text", "/home/me/my_text")
    True
    """
    if not isinstance(recorded, str) or not isinstance(other, str) or PACKAGED in (recorded, other):
        return recorded == other
    if os.path.abspath(recorded) == os.path.abspath(other):
        return True
    relative, absolute = sorted((Path(recorded), Path(other)), key=Path.is_absolute)
    parts = tuple(part for part in Path(os.path.normpath(relative)).parts if part != "..")
    return bool(parts) and absolute.is_absolute() and absolute.parts[-len(parts) :] == parts


def find_tokenizer(path: Path) -> Path:
    """The tokenizer.json that ``path`` names: itself, or the one in this folder."""
    path = path.expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"The tokenizer must be a tokenizer.json or a folder with one: {file} does not exist."
            f"{suggest_paths(file)} Check the path, or leave the option out to train a tokenizer on the text."
        )
    return file


def _looks_like_hub(name: str) -> bool:
    return "/" in name and bool(re.fullmatch(HUB_NAME, name))
