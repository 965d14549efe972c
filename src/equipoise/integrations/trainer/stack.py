"""Finds the Trainer that calls its callbacks, by a private name: all that leans on the Trainer's frames is here.

Seen in Transformers 5.23.0.
"""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import transformers
from transformers import Trainer

from equipoise.errors import EquipoiseError

__all__ = ["find_calling_trainer"]

CHECKPOINT = "resume_from_checkpoint"


def find_calling_trainer() -> tuple[Any, Path | None]:
    """The Trainer on the call stack and the checkpoint that it resumes from; None for each that is not there.

    The stack is read because no event passes either of them to a callback. Raises ``EquipoiseError`` if a Trainer is on
    it and none of its frames says from which checkpoint it resumes: a state would be left behind without a word.
    """
    trainer = None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            trainer = caller
            checkpoint = frame.f_locals.get(CHECKPOINT, True)
            if checkpoint is None or isinstance(checkpoint, str | Path):
                return caller, checkpoint if checkpoint is None else Path(checkpoint)
        frame = frame.f_back
    if trainer is not None:
        raise EquipoiseError(
            f"Trainer.train() must have a variable {CHECKPOINT}, None or a folder, that says where its training "
            f"begins: that of Transformers {transformers.__version__} has not. Seen in 5.23. Install that version, or "
            "an equipoise that knows this one."
        )
    return None, None
