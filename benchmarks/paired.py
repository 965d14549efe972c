"""Timing for benchmarks. Candidates run in turn (A B A B ...), so other work on the machine affects them alike.

The result is the median of the ratios of neighbours, with an interval that assumes no distribution.
"""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy import stats

__all__ = ["in_turn", "ratio", "run_facts", "stopwatch"]


def wall_seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def cuda_seconds(call: Callable[[], Any]) -> float:
    """By CUDA events, on an idle device: from when the call begins until the device has done all of it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """What times a call whose work is done on this device."""
    return cuda_seconds if device.type == "cuda" else wall_seconds


def in_turn(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    between: Callable[[], Any] = lambda: None,
    seconds_of: Callable[[Callable[[], Any]], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of each call, without the first ``warm_up`` rounds. Every other round runs in reverse order.

    ``between`` is called after each call and is not timed. ``seconds_of`` makes a call and times it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warm_up + rounds):
        order = list(candidates.items())
        for name, call in reversed(order) if round_number % 2 else order:
            seconds[name].append(seconds_of(call))
            between()
    return {name: values[warm_up:] for name, values in seconds.items()}


def ratio(above: Sequence[float], below: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """The median over rounds of ``above / below``, and the interval of order statistics that covers the true median
    with at least probability ``level``. With too few rounds for that, the interval is the extremes.

    >>> result = ratio([2, 4, 6, 8, 10, 12], [2, 2, 2, 2, 2, 2])
    >>> result["median"], result["low"], result["high"]
    (3.5, 1.0, 6.0)
    """
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    n = len(ratios)
    rank = max(0, int(stats.binom.ppf((1 - level) / 2, n, 0.5)) - 1)  # index of the lower end
    return {"median": statistics.median(ratios), "low": ratios[rank], "high": ratios[n - 1 - rank], "rounds": n}


def run_facts(command: str, *packages: str) -> dict[str, Any]:
    """Where a result comes from: command, date, hardware, versions."""
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
