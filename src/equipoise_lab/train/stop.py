"""How a run stops: an interrupt is never lost, and the ranks of a run stop together. Imports no torch.

A rank that gets SIGTERM cannot know why. Either the user stops the run, or torchrun ends the remaining ranks after one
was lost. So the rank continues for a short grace period. If every rank got the signal, all ranks stop after the same
step. If a rank was lost, the next collective fails and its error says so.
"""

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, final

__all__ = ["StopHandler", "repeat_lost_interrupts", "stop_requested"]

GRACE = 2.0  # seconds from the signal until the rank stops wherever it is
REPEAT = 0.05  # seconds after which a lost interrupt is raised again


def repeat_lost_interrupts() -> None:
    """Raises an interrupt again that Python ignored, because it came inside a ``__del__`` or a weakref callback."""
    if not hasattr(signal, "setitimer"):  # Windows
        return
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    if getattr(sys.unraisablehook, "func", None) is not _repeat_or_report:
        sys.unraisablehook = partial(_repeat_or_report, sys.unraisablehook)


def _repeat_or_report(report: Callable[[Any], Any], ignored: Any) -> None:
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, REPEAT)
    else:
        report(ignored)


@final
class StopHandler:
    """Handles SIGTERM and Ctrl-C on one of several ranks. ``StopHandler(rank).install()`` puts it in place."""

    def __init__(self, rank: int):
        self.rank = rank
        self.requested_at: float | None = None  # time.monotonic() of the first signal

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)
        repeat_lost_interrupts()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested_at is None:
            self.requested_at = time.monotonic()
            # Rank 0 stops a second before the others: it is the one that prints the message.
            signal.setitimer(signal.ITIMER_REAL, GRACE + (1 if self.rank else 0))

    def has_rank_0_stopped(self) -> bool:
        """Whether rank 0 has stopped by now. Another rank that then loses its connection need not report it."""
        return self.rank > 0 and self.requested_at is not None and time.monotonic() - self.requested_at > GRACE - 0.5


def stop_requested() -> StopHandler | None:
    """The stop handler if this process was asked to stop, else None."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, StopHandler) and handler.requested_at is not None else None
