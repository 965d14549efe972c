"""Finds the Trainer that calls its callbacks."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer

__all__ = ["find_calling_trainer"]


def find_calling_trainer() -> tuple[Any, Path | None]:
    """The Trainer on the call stack and the checkpoint that it resumes from; None for each that is not there.

    The stack is read because no event passes either of them to a callback.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            checkpoint = frame.f_locals["resume_from_checkpoint"]
            return caller, Path(checkpoint) if isinstance(checkpoint, str | Path) else None
        frame = frame.f_back
    return None, None
