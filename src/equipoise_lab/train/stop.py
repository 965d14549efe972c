"""How several ranks stop together. Imports no torch.

SIGTERM does not tell a rank whether the user stops the run or torchrun ends what another rank's loss left. So a rank
that is told goes on for a moment: if all were told they stop after the same step, and if one was lost, the next
collective finds out and says so.
"""

import signal
import time
from types import FrameType
from typing import final

__all__ = ["Told", "told"]

GRACE = 2.0  # seconds from being told to stopping wherever it is


@final
class Told:
    """The handler of SIGTERM and Ctrl-C on one of several ranks; ``Told(rank).listen()`` puts it in place."""

    def __init__(self, rank: int):
        self.rank = rank
        self.at: float | None = None  # when it was told

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)
        signal.signal(signal.SIGALRM, signal.default_int_handler)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.at is None:
            self.at = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, GRACE + (1 if self.rank else 0))  # rank 0 first: it says so

    def follows_the_first(self) -> bool:
        """Whether rank 0 has stopped by now, so that whoever misses it need not say so."""
        return self.rank > 0 and self.at is not None and time.monotonic() - self.at > GRACE - 0.5


def told() -> Told | None:
    """The handler, if this process was told to stop."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Told) and handler.at is not None else None
