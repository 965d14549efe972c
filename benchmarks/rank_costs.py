"""What does balancing cost on many ranks? Step time with and without it, and how its local part grows.

    python benchmarks/rank_costs.py            # measures, stores results/rank_costs.json, writes docs/evidence/speed.md

Step time: gloo ranks on this machine, one thread each, train the lab's default model under DistributedDataParallel.
Each rank has the model twice, attached and not, and steps both in turn. The result is the ratio within a pair of steps:
its median and quartiles over the pairs. If ranks share cores, a single step says nothing, but a pair does.

Growth: one process has routers of up to 128 layers x 1024 experts, as each of 1024 ranks would have. Only local work is
measured: `step()` and the counting of a router call. For the network docs/how-to/many_ranks.md has a formula.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded: its threads must not spin on shared cores

import speed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import equipoise
from equipoise.nn import Router
from equipoise_lab.records import read_json, write_json
from equipoise_lab.train.config import Train
from equipoise_lab.train.evaluate import language_model_loss
from equipoise_lab.train.models import build_model

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks" / "results" / "rank_costs.json"
STRATEGIES = ("none", "loss-free", "quantile", "lbl:pooling=previous", "lbl", "loss-free+lbl:scope=sequence")
LAYERS, EXPERTS = (8, 32, 128), (64, 256, 1024)
MICRO_BATCHES, SEQUENCES, LENGTH, VOCAB = 2, 4, 128, 2048
TOKENS, WIDTH, K = 1024, 16, 8  # of the routers in `growth`


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    [2.0, 3.0, 4.0]
    """
    return statistics.quantiles(values, n=4, method="inclusive")


class Side:
    """One of the two models of a pair, with its optimizer."""

    def __init__(self, strategy: str | None):
        inner = build_model(Train(out=Path("unused")), VOCAB).train()
        self.balance = None if strategy is None else equipoise.attach(inner, strategy)
        self.model = nn.parallel.DistributedDataParallel(inner)
        self.optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3, fused=True)

    def step(self, batch: torch.Tensor) -> float:
        """Takes one optimizer step; returns the seconds until the last rank has finished."""
        dist.barrier()
        started = time.perf_counter()
        losses = []
        for micro_batch in batch:
            loss = language_model_loss(self.model, micro_batch)
            losses.append(loss if self.balance is None else loss + self.balance.loss())
        (torch.stack(losses).sum() / len(losses)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balance is not None:
            self.balance.step()
        dist.barrier()
        return time.perf_counter() - started


def measure_pairs(rank: int, strategy: str, num_pairs: int) -> dict[str, Any]:
    """One row: the step time with ``strategy`` over that without equipoise."""
    sides = [Side(None), Side(strategy)]
    generator = torch.Generator().manual_seed(rank)
    seconds: list[list[float]] = [[], []]
    for pair in range(num_pairs + 2):
        batch = torch.randint(0, VOCAB, (MICRO_BATCHES, SEQUENCES, LENGTH), generator=generator)
        for side in (0, 1) if pair % 2 else (1, 0):
            seconds[side].append(sides[side].step(batch))
    plain, balanced = (values[2:] for values in seconds)  # the first two pairs are warm-up
    metrics = sides[1].balance.metrics()
    return {
        "strategy": strategy,
        "ratio": quartiles([above / below for above, below in zip(balanced, plain, strict=True)]),
        "seconds_without": statistics.median(plain),
        "collectives": int(metrics["collectives"]),
        "collective_bytes": int(metrics["collective_bytes"]),
    }


def run_rank(rank: int, num_ranks: int, folder: str, num_pairs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=num_ranks)
    for strategy in STRATEGIES:
        row = measure_pairs(rank, strategy, num_pairs)
        if rank == 0:
            print(f"{strategy}: {row['ratio'][1]:.3f}", file=sys.stderr, flush=True)
            write_json(Path(folder) / f"{STRATEGIES.index(strategy)}.json", row)
    dist.destroy_process_group()


def step_time(num_ranks: int, num_pairs: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (num_ranks, folder, num_pairs), nprocs=num_ranks)
        return [read_json(Path(folder) / f"{index}.json") for index in range(len(STRATEGIES))]


class Routers(nn.Module):
    def __init__(self, layers: int, experts: int):
        super().__init__()
        self.routers = nn.ModuleList(Router(WIDTH, experts, K) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> None:
        for router in self.routers:
            router(x)


def time_call(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


@torch.no_grad()
def growth(layers: int, experts: int, num_pairs: int) -> dict[str, Any]:
    """One row: the local cost of Loss-Free for this many layers and experts."""
    torch.manual_seed(0)
    plain, attached = Routers(layers, experts).train(), Routers(layers, experts).train()
    balance = equipoise.attach(attached, "loss-free")
    steps, calls = [], []
    for pair in range(num_pairs + 2):
        x = torch.randn(TOKENS, WIDTH)
        order = (plain, attached) if pair % 2 else (attached, plain)
        with balance.counting():
            seconds = {model: time_call(model, x) for model in order}
        calls.append((seconds[attached] - seconds[plain]) / layers)
        steps.append(time_call(balance.step))
    return {
        "layers": layers,
        "experts": experts,
        "step_milliseconds": 1e3 * statistics.median(steps[2:]),
        "call_microseconds": 1e6 * statistics.median(calls[2:]),
        "collective_bytes": 8 * layers * experts,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = [growth(layers, experts, arguments.pairs) for layers in LAYERS for experts in EXPERTS]
    return {
        "command": shlex.join(["python", "benchmarks/rank_costs.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no accelerator",
        "versions": {name: importlib.metadata.version(name) for name in ("equipoise", "torch", "transformers")},
        "ranks": arguments.ranks,
        "pairs": arguments.pairs,
        "step": f"{MICRO_BATCHES} micro-batches of {SEQUENCES} x {LENGTH} tokens per rank",
        "step_time": step_time(arguments.ranks, arguments.pairs),
        "growth": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="number of gloo ranks")
    parser.add_argument("--pairs", type=int, default=20, help="measured pairs of steps")
    arguments = parser.parse_args()
    stored = measure(arguments)
    write_json(STORED, stored)
    speed.write()
    print(json.dumps(stored))


if __name__ == "__main__":
    main()
