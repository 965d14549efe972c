"""How many CPU cores a command may use."""

import os
from pathlib import Path

__all__ = ["num_cores"]

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "LIMIT PERIOD" in microseconds of CPU time; LIMIT may be "max"


def num_cores(quota: Path = QUOTA) -> int:
    """Cores that this process may use: its CPU affinity (Slurm sets it), limited by the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))
