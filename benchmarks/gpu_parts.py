"""What a part of `gpu.py` is: checks and measurements, each with a row of its own in the result."""

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["OK", "FAILED", "NOT_RUN", "NotRun", "Part", "Row", "Setting", "make_row", "require_gpu", "status_of"]

OK, FAILED, NOT_RUN = "ok", "failed", "not run"
ROOT = Path(__file__).parent.parent
MOST_CHARACTERS = 500  # of a message
Row = dict[str, Any]


class Setting(NamedTuple):
    """Where the parts run. ``small``: on sizes that a CPU can run in seconds."""

    device: torch.device
    small: bool

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"


class Part(NamedTuple):
    """``rows`` yields each row as soon as it is known, so a part that is cut keeps those it has."""

    name: str
    title: str
    shows: str  # what it shows if it is ok
    seconds: int  # the most that it may take
    rows: Callable[[Setting], Iterator[Row]]


class NotRun(Exception):
    """A check cannot be made here. The message is the reason."""


def require_gpu(setting: Setting) -> None:
    if not setting.has_gpu:
        raise NotRun("needs a GPU")


def make_row(what: str, check: Callable[[], Row | None]) -> Row:
    """The row of one check: its figures, or why it failed. An error never reaches the other rows."""
    try:
        return {"what": what, "status": OK, **(check() or {})}
    except NotRun as reason:
        return {"what": what, "status": NOT_RUN, "message": str(reason)}
    except Exception as error:
        return {"what": what, "status": FAILED, "message": describe_error(error)}


def describe_error(error: Exception) -> str:
    """Kind, message, and the innermost line of this project."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    own = [frame for frame in frames if ".venv" not in Path(frame.filename).parts]
    return f"{text} ({Path(own[-1].filename).relative_to(ROOT)}, line {own[-1].lineno})" if own else text


def status_of(rows: list[Row]) -> tuple[str, str]:
    """The status of a part by its rows, and a message."""
    failed = [f"{row['what']}: {row['message']}" for row in rows if row["status"] == FAILED]
    if failed:
        return FAILED, f"{len(failed)} of {len(rows)} rows failed. First, {failed[0]}"
    skipped = [row["message"] for row in rows if row["status"] == NOT_RUN]
    if len(skipped) == len(rows):
        return NOT_RUN, skipped[0] if skipped else "it has no rows"
    return OK, ""
