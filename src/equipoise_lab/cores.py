"""How many cores a command may use."""

import os
from pathlib import Path

__all__ = ["num_cores"]

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU time in each period, or max


def num_cores(quota: Path = QUOTA) -> int:
    """Those that this process is bound to, as by Slurm, and no more than the share of time that its container has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if most == "max" else max(1, min(cores, int(most) // int(period)))
