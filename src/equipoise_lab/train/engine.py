"""How the lab uses a machine: device, precision, reproducibility and memory."""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["keep_freed_memory", "learning_rate_at", "machine", "reproducible"]


def machine(dtype: str) -> tuple[torch.device, bool]:
    """The device, and whether forwards run under bfloat16 autocast. ``dtype`` is that option of ``train``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto":
        return device, dtype == "bfloat16"
    if device.type == "cuda":
        return device, torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device, bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


@contextmanager
def reproducible() -> Iterator[None]:
    """Makes runs reproducible: the same command gives the same numbers, bit for bit.

    Deterministic algorithms use no atomic additions, whose order changes from run to run.
    """
    deterministic: Any = torch.utils.deterministic
    modes_before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills_before = deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(modes_before[0], warn_only=modes_before[1])
        deterministic.fill_uninitialized_memory = fills_before


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory; does nothing with another C library.

    A training step allocates the same large blocks again and again. Fresh pages from the kernel cost more than the
    arithmetic on them.
    """
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def learning_rate_at(step: int, *, steps: int, peak: float, warmup: float, decay_to: float = 0.1) -> float:
    """Linear warm-up over ``warmup * steps`` steps, then a cosine down to ``decay_to * peak`` at the last step.

    ``step`` counts from 0.

    >>> [round(learning_rate_at(s, steps=5, peak=1.0, warmup=0.4), 3) for s in range(5)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    >>> [round(learning_rate_at(s, steps=5, peak=1.0, warmup=0.4, decay_to=0.0), 3) for s in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup_steps = int(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
    return peak * (decay_to + (1 - decay_to) * 0.5 * (1 + math.cos(math.pi * progress)))
