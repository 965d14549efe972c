"""How the ranks of a run stop together. Imports no torch.

A rank that gets SIGTERM cannot know why. Either the user stops the run, or torchrun ends the remaining ranks after one
was lost. So the rank continues for a short grace period. If every rank got the signal, all ranks stop after the same
step. If a rank was lost, the next collective fails and its error says so.
"""

import signal
import time
from types import FrameType
from typing import final

__all__ = ["StopHandler", "stop_requested"]

GRACE = 2.0  # seconds from the signal until the rank stops wherever it is


@final
class StopHandler:
    """Handles SIGTERM and Ctrl-C on one of several ranks. ``StopHandler(rank).install()`` puts it in place."""

    def __init__(self, rank: int):
        self.rank = rank
        self.requested_at: float | None = None  # time.monotonic() of the first signal

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)
        signal.signal(signal.SIGALRM, signal.default_int_handler)

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
