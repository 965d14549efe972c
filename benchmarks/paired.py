"""What timings are made with: things that are compared run in turn (A B A B ...), so that what else the machine does
meets them alike; what is told is the median of the ratios of neighbours, with an interval that assumes nothing."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

__all__ = ["Others", "facts", "in_turn", "ratio"]


def in_turn(
    things: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2, between: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call, after ``warm_up`` rounds that are not kept. Every other round goes backwards. ``between``
    is called after each, and not timed."""
    took: dict[str, list[float]] = {name: [] for name in things}
    for number in range(warm_up + rounds):
        order = list(things.items())
        for name, call in reversed(order) if number % 2 else order:
            started = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - started)
            between()
    return {name: seconds[warm_up:] for name, seconds in took.items()}


def ratio(above: Sequence[float], below: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """The median of ``above / below`` by round, and the interval of order statistics that covers the true median with
    at least this probability (the extremes, where there are too few rounds for that).

    >>> found = ratio([2, 4, 6, 8, 10, 12], [2, 2, 2, 2, 2, 2])
    >>> found["median"], found["low"], found["high"]
    (3.5, 1.0, 6.0)
    """
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    n = len(ratios)
    rank = max(0, int(stats.binom.ppf((1 - level) / 2, n, 0.5)) - 1)  # of the lower end, from 0
    return {"median": statistics.median(ratios), "low": ratios[rank], "high": ratios[n - 1 - rank], "rounds": n}


class Others:
    """What other programs take of this machine while we measure."""

    def __init__(self) -> None:
        self._began = self._now()

    def cores(self) -> float | None:
        """How many cores were theirs, on average since the beginning; None where the system does not tell."""
        if self._began is None or (now := self._now()) is None:
            return None
        wall, busy, ours = (b - a for a, b in zip(self._began, now, strict=True))
        return max(0.0, (busy - ours) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of the wall, of all cores at work, of this process and its children that are over at work."""
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return None
        user, nice, system, _idle, _waiting, hard, soft, stolen = map(int, words[1:9])
        ticks = user + nice + system + hard + soft + stolen
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def facts(command: str, *packages: str) -> dict[str, Any]:
    """What a result must say of where it is from."""
    threads = torch.get_num_threads()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("equipoise", "torch", *packages)},
        },
    }
