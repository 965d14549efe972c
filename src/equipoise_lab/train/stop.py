"""How a run stops: after a step, with a checkpoint; an interrupt is never lost; the ranks of a run stop together.

    first signal    inside ``deferred()``: only asks. The run ends its step, writes a checkpoint and stops.
                    elsewhere: raises KeyboardInterrupt.
    second signal   raises KeyboardInterrupt wherever the process is, if it is the same one as a signal before.

A rank that gets SIGTERM cannot know why. Either the user stops the run, or torchrun ends the remaining ranks after one
was lost. So the rank continues for a grace period. If every rank got the signal, all ranks stop after the same step. If
a rank was lost, the next collective fails and its error says so. Imports no torch.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, final

__all__ = ["StopHandler", "deferred", "end_grace", "repeat_lost_interrupts", "stop_requested"]

GRACE = 2.0  # seconds from the signal until a rank stops wherever it is, outside of its steps
GRACE_OF_STEP = 25.0  # the same, in a step; torchrun kills its ranks 30 s after the signal
REPEATED = 1.0  # seconds: torchrun sends its ranks the signal again that the terminal has sent them
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
    """Handles SIGTERM and Ctrl-C. ``StopHandler().install()`` puts it in place.

    ``num_ranks`` is the number of ranks of the run. A ``is_worker`` process is stopped by its parent: it announces
    nothing, and takes one signal only, because its parent kills it if the user does not want to wait.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1, *, is_worker: bool = False):
        self.rank, self.num_ranks, self.is_worker = rank, num_ranks, is_worker
        self.requested_at: float | None = None  # time.monotonic() of the first signal
        self.signals, self.grace = list[int](), GRACE  # those that came, without repetitions
        self.announce: Callable[[], None] | None = None  # what to call at the first signal, inside deferred()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            if self.num_ranks > 1 or signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or "&" in a script
                signal.signal(number, self)
        repeat_lost_interrupts()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_deferred, now = self.announce is not None, time.monotonic()
        if self.requested_at is not None:
            if self._leaves_at_once(number, now, is_deferred):
                raise KeyboardInterrupt
            if number not in self.signals:
                self.signals.append(number)
            return
        self.requested_at = now
        self.signals.append(number)
        if self.num_ranks > 1:
            self.grace = GRACE_OF_STEP if is_deferred else GRACE
            # Rank 0 stops a second before the others: it is the one that prints the message.
            signal.setitimer(signal.ITIMER_REAL, self.grace + (1 if self.rank else 0))
        elif not is_deferred:
            raise KeyboardInterrupt
        if self.announce is not None and not self.is_worker:
            # In a thread: the main thread may be inside the lock that printing needs.
            threading.Thread(target=self.announce, daemon=True).start()

    def _leaves_at_once(self, number: int, now: float, is_deferred: bool) -> bool:
        """Whether a signal after the first one raises KeyboardInterrupt.

        A signal of another kind is not a second Ctrl-C: it may come from a parent that got the same Ctrl-C.
        """
        assert self.requested_at is not None
        if self.is_worker:
            return False
        if self.num_ranks > 1:
            return number == self.signals[0] and now - self.requested_at > REPEATED
        return number in self.signals or not is_deferred

    def has_rank_0_stopped(self) -> bool:
        """Whether rank 0 has stopped by now. Another rank that then loses its connection need not report it."""
        return (
            self.rank > 0 and self.requested_at is not None and time.monotonic() - self.requested_at > self.grace - 0.5
        )


def _handler() -> StopHandler | None:
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, StopHandler) else None


def stop_requested() -> StopHandler | None:
    """The stop handler if this process was asked to stop, else None."""
    handler = _handler()
    return None if handler is None or handler.requested_at is None else handler


@contextmanager
def deferred(announce: Callable[[], None]) -> Iterator[None]:
    """Inside, the first signal calls ``announce()`` and does nothing else: the block asks ``stop_requested()``.

    A single process that got a signal and did not stop inside the block stops at its end. Without a ``StopHandler``,
    as in a notebook, the block changes nothing.
    """
    handler = _handler()
    if handler is None:
        yield
        return
    handler.announce = announce
    try:
        yield
    finally:
        handler.announce = None
    if handler.num_ranks == 1 and handler.requested_at is not None:
        raise KeyboardInterrupt


def end_grace() -> None:
    """All ranks stop now, with a checkpoint: no rank stops before, wherever it is."""
    if (handler := stop_requested()) is not None and handler.num_ranks > 1:
        signal.setitimer(signal.ITIMER_REAL, 0)
