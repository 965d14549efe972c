"""Runs a function on several gloo ranks on this machine and brings back what each returned.

Ranks are forked from a server that has imported torch and the models once, so that a rank starts at once.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch", "torch.distributed.fsdp", "models", "equipoise.attachment", "equipoise_lab.train.compare"]
TIMEOUT = timedelta(seconds=60)  # of a collective of the world; other groups have torch's half an hour
LIMIT = 300  # seconds until ranks that wait for each other are stopped


def _rank(rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    try:
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    except Exception:  # the others find it gone, and need not wait
        if not Path(f"{folder}/{rank}.pt").exists():
            torch.save(traceback.format_exc(), f"{folder}/{rank}.pt")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads are not taken down: once, a rank that had stored its result aborted while they were


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` on each rank; a traceback in place of what a rank could not return."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, folder, function, args)
        ranks = mp.start_processes(_rank, arguments, nprocs=num_ranks, start_method="forkserver", join=False)
        end = time.monotonic() + LIMIT
        while not ranks.join(timeout=max(end - time.monotonic(), 0)):
            if time.monotonic() >= end:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"the ranks must end within {LIMIT} seconds: some still wait for each other.")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def distance(ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Of all gradients together, relative, by norm."""
    assert ours.keys() == expected.keys()
    difference = sum(float((ours[name] - expected[name]).double().square().sum()) for name in expected)
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5
