"""What does balancing cost in a training step on one machine? The lab's default model, strategy by strategy.

    python benchmarks/overhead.py    # writes benchmarks/results/overhead.json

Steps: lab runs that differ only by their strategy take one step each, in turn. The ratio over `none` is the median of
rounds, see paired.py. Targets: loss-free 1.01, global-batch loss 1.015, quantile and the loss within sequences 1.02.
The upper end of the interval may be 0.02 higher.

Routers: a window of eight micro-batches through the default model's routers alone, attached over not attached. If the
strategy has a loss, `loss()` of every micro-batch is included. Then the same with backwards and the `step()` at the
end. Calls have as many tokens as a step, or as a micro-batch. Target for the forward: 1.05 for `frozen` and
`loss-free`, which only count. The floor for the loss is its bare operations on the same tensors, without the library.

Updates: `step()` for routers alone. Shapes: 64 layers of 256 experts (target: 1.2 of its bare operations), half and
twice the layers, a quarter of the experts, and four times the tokens. The time must not depend on the tokens.

Alerts: `Alerts.see` once per window, including the read of loads and biases. Three times: in a usual window, in a
window that ends a stretch and judges it, and the mean of all.

Collectives: `step()` of two gloo ranks that pool their counts, over the same ranks each alone, in turn.

Memory: peak resident memory of a process that takes three steps, attached over not attached. Target: 1.02.

Start: `equipoise --help` (target 0.5 s), and the time `import equipoise` adds to `import torch` (target 0.1 s).

The last line on stdout is the result as JSON.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as the command line does

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from paired import in_turn, ratio, run_facts
from speed_costs import HELP_LIMIT, IMPORT_LIMIT
from torch import nn

import equipoise
from equipoise.alerts import PATIENCE
from equipoise.nn import Router
from equipoise.routing import score
from equipoise_lab.records import read_json, write_json
from equipoise_lab.train.config import Train
from equipoise_lab.train.engine import reproducible
from equipoise_lab.train.loop import _Training
from equipoise_lab.train.run_folder import SilentWatcher

STORED = Path(__file__).parent / "results" / "overhead.json"
STEP_LIMITS = {"loss-free": 1.01, "lbl:scope=global_batch": 1.015, "quantile": 1.02, "lbl:scope=sequence": 1.02}
OTHERS = ("loss-free+lbl:scope=sequence,coefficient=1e-4",)
ROUTER = (128, 32, 4)  # dim, experts, k: the default model's
TOKENS = (8192, 1024)  # of a call: the default model's in a step, and in a micro-batch
LAYERS, MICRO_BATCHES = 3, 8
ROUTER_STRATEGIES = ("frozen", "loss-free", "lbl:scope=global_batch", "quantile")
FORWARD_LIMIT = 1.05
COUNTING_ONLY = ("frozen", "loss-free")  # strategies that only count in the forward
UPDATE_SHAPES = ((64, 256, 256), (32, 256, 256), (128, 256, 256), (64, 64, 256), (64, 256, 1024))
ALERT_SHAPES = ((64, 256, 8, 256), (3, 32, 4, 8192))  # layers, experts, k, tokens; the second is the default model
RANKS = 2
START_ATTEMPTS = 5  # processes
MEMORY_ATTEMPTS = 3  # processes; memory hardly varies between them
MEMORY_LIMIT = 1.02


def steps(folder: Path, rounds: int, **options: Any) -> list[dict[str, Any]]:
    """One row for each strategy: the time of a step over that of `none`."""
    strategies = ["none", *STEP_LIMITS, *OTHERS]
    with reproducible():
        runs = {
            name: _Training(Train(out=folder / str(i), strategy=name, steps=rounds + 3, **options), SilentWatcher(), "")
            for i, name in enumerate(strategies)
        }
        counters = dict.fromkeys(runs, 0)

        def step(name: str) -> Callable[[], None]:
            def call() -> None:
                runs[name]._step(counters[name])
                counters[name] += 1

            return call

        seconds = in_turn({name: step(name) for name in runs}, rounds, warm_up=3)
    rows = []
    for name in strategies[1:]:
        over_none = ratio(seconds[name], seconds["none"])
        limit = STEP_LIMITS.get(name)
        holds = None if limit is None else over_none["median"] <= limit and over_none["high"] <= limit + 0.02
        rows.append({"strategy": name, "ratio": over_none, "limit": limit, "holds": holds})
    return [{"strategy": "none", "seconds": statistics.median(seconds["none"])}, *rows]


def routers(rounds: int) -> list[dict[str, Any]]:
    """One row for each strategy and number of tokens: attached routers over plain ones."""
    dim, experts, k = ROUTER
    rows = []
    for tokens in TOKENS:
        hidden = torch.randn(tokens, dim)
        plain = nn.ModuleList(Router(dim, experts, k) for _ in range(LAYERS)).train()
        rows += [_routers(strategy, plain, hidden, rounds) for strategy in ROUTER_STRATEGIES]
    return rows


def _routers(strategy: str, plain: nn.ModuleList, hidden: torch.Tensor, rounds: int) -> dict[str, Any]:
    attached = deepcopy(plain)
    balance = equipoise.attach(attached, strategy)
    has_loss = strategy.startswith("lbl")
    is_window_open: list[bool] = []  # of the last call

    def forwards(is_attached: bool) -> None:
        for _ in range(MICRO_BATCHES):
            for router in attached if is_attached else plain:
                router(hidden)
            if is_attached and has_loss:
                balance.loss()
        is_window_open.append(is_attached)

    def close() -> None:
        if is_window_open.pop():
            balance.step()
        copy_biases()

    def copy_biases() -> None:
        """Makes both choose the same experts: the time of a top-k depends on its input."""
        for plain_router, attached_router in zip(plain, attached, strict=True):
            plain_router.e_score_correction_bias.copy_(attached_router.e_score_correction_bias)

    def with_backwards(is_attached: bool) -> None:
        for _ in range(MICRO_BATCHES):
            modules = attached if is_attached else plain
            loss = sum((router(hidden)[1].square().mean() for router in modules), torch.zeros(()))
            (loss + balance.loss() if is_attached and has_loss else loss).backward()
        is_window_open.append(False)
        if is_attached:
            balance.step()

    copy_biases()
    row: dict[str, Any] = {"strategy": strategy, "tokens": len(hidden)}
    for name, call in (("forward", forwards), ("forward_and_backward", with_backwards)):
        seconds = in_turn({"attached": partial(call, True), "plain": partial(call, False)}, rounds, between=close)
        row[name] = ratio(seconds["attached"], seconds["plain"])
        row[name]["milliseconds_plain"] = 1000 * statistics.median(seconds["plain"]) / MICRO_BATCHES / len(plain)
    row["milliseconds_bare"] = _bare_loss(plain[0], hidden, rounds) if has_loss else None
    row["limit"] = FORWARD_LIMIT if strategy in COUNTING_ONLY else None
    row["holds"] = None if row["limit"] is None else row["forward"]["median"] <= FORWARD_LIMIT
    return row


@torch.no_grad()
def _bare_loss(router: Router, hidden: torch.Tensor, rounds: int) -> float:
    """Milliseconds of the bare work for one call: count, sums of scores, gradient at the scores that autograd keeps."""
    logits, _, expert_ids = router(hidden)
    scores, loss, milliseconds = score(logits, router.router_kind.score_function), equipoise.LoadBalancingLoss(), []
    gradient = torch.zeros_like(scores)
    for _ in range(rounds * MICRO_BATCHES * LAYERS):
        started = time.perf_counter()
        load = torch.bincount(expert_ids.reshape(-1), minlength=logits.shape[-1])
        total = scores.sum(-1, keepdim=True)
        mass = (scores / total).sum(0)
        slope = loss.slopes(load).float()
        torch.dot(mass, slope)
        gradient = gradient + (slope - (scores @ slope)[:, None] / total) / total
        milliseconds.append(1000 * (time.perf_counter() - started))
    return statistics.median(milliseconds)


@torch.no_grad()
def update(layers: int, experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of ``step()`` and of its bare operations on the same tensors (the floor), in turn."""
    model = nn.ModuleList(Router(16, experts, 8) for _ in range(layers)).train()
    slots = [router.e_score_correction_bias for router in model]
    balance = equipoise.attach(model, "loss-free")
    hidden, milliseconds, floor = torch.randn(tokens, 16), [], []

    def call_routers() -> None:
        with balance.counting():
            for router in model:
                router(hidden)

    for window in range(2 * rounds + 3):
        call_routers()
        if window % 2:  # right after the forwards, as step() is
            load, bias = torch.stack(list(balance.load.values())), torch.stack(list(balance.biases.values()))
            call_routers()
            started = time.perf_counter()
            bare_step(slots, bias, load)
            floor.append(1000 * (time.perf_counter() - started))
        started = time.perf_counter()
        balance.step()
        if not window % 2:
            milliseconds.append(1000 * (time.perf_counter() - started))
    return {
        "layers": layers,
        "experts": experts,
        "tokens": tokens,
        "milliseconds": statistics.median(milliseconds[2:]),
        "floor_milliseconds": statistics.median(floor[1:]),
        "over_floor": ratio(milliseconds[2:], floor[1:]),
    }


def bare_step(slots: list[torch.Tensor], bias: torch.Tensor, load: torch.Tensor) -> None:
    """The bare work of Loss-Free's step: read the slots, move the biases, write them. No windows, ranks or checks."""
    torch.equal(torch.stack(slots), bias)
    error = torch.sub(load.sum(-1, keepdim=True), load, alpha=load.shape[-1]).sign_().to(bias.dtype)
    bias.add_(error.sub_(error.mean(-1, keepdim=True)), alpha=1e-3)
    torch._foreach_copy_(slots, bias.unbind())


def alerts(layers: int, experts: int, k: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of ``Alerts.see`` a window."""
    model = nn.ModuleList(Router(16, experts, k) for _ in range(layers)).train()
    balance, monitor = equipoise.attach(model, "loss-free"), equipoise.Alerts()
    hidden, milliseconds = torch.randn(tokens, 16), []
    for _ in range(max(rounds, 2 * PATIENCE)):
        with torch.no_grad(), balance.counting():
            for router in model:
                router(hidden)
        balance.step()
        started = time.perf_counter()
        monitor.see(balance.load, 1.0, balance.biases)
        milliseconds.append(1000 * (time.perf_counter() - started))
    milliseconds = milliseconds[PATIENCE : len(milliseconds) // PATIENCE * PATIENCE]  # whole stretches after the first
    judged = milliseconds[PATIENCE - 1 :: PATIENCE]
    return {
        "layers": layers,
        "experts": experts,
        "milliseconds": statistics.median(milliseconds),
        "milliseconds_judged": statistics.median(judged),
        "milliseconds_mean": statistics.mean(milliseconds),
    }


def collectives(layers: int, experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    """`step()` of ranks on this machine that pool their counts, over ranks that do not."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_a_rank, (folder, layers, experts, tokens, rounds), nprocs=RANKS)
        return read_json(Path(folder) / "row.json")


def _on_a_rank(rank: int, folder: str, layers: int, experts: int, tokens: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    alone_group = [dist.new_group([member]) for member in range(RANKS)][rank]
    models = {
        name: nn.ModuleList(Router(16, experts, 8) for _ in range(layers)).train() for name in ("pooled", "alone")
    }
    balances = {
        "pooled": equipoise.attach(models["pooled"], "loss-free"),
        "alone": equipoise.attach(models["alone"], "loss-free", group=alone_group),
    }
    hidden = torch.randn(tokens, 16)
    milliseconds: dict[str, list[float]] = {name: [] for name in models}
    for window in range(rounds + 3):
        for name in models if window % 2 else reversed(models):
            with torch.no_grad(), balances[name].counting():
                for router in models[name]:
                    router(hidden)
            dist.barrier()
            started = time.perf_counter()
            balances[name].step()
            milliseconds[name].append(1000 * (time.perf_counter() - started))
    milliseconds = {name: values[3:] for name, values in milliseconds.items()}
    if rank == 0:
        metrics = balances["pooled"].metrics()
        row = {
            "layers": layers,
            "experts": experts,
            "ranks": RANKS,
            "milliseconds": statistics.median(milliseconds["pooled"]),
            "milliseconds_alone": statistics.median(milliseconds["alone"]),
            "ratio": ratio(milliseconds["pooled"], milliseconds["alone"]),
            "collectives": int(metrics["collectives"]),
            "collective_bytes": int(metrics["collective_bytes"]),
        }
        write_json(Path(folder) / "row.json", row)
    dist.destroy_process_group()


def peak_megabytes(attached: bool, folder: str) -> float:
    """Peak resident memory of a new process that takes three steps."""
    code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from overhead import three_steps
three_steps({attached}, Path({folder!r}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def three_steps(attached: bool, folder: Path) -> None:
    with reproducible():
        run = _Training(Train(out=folder, strategy="lbl:scope=global_batch", steps=3), SilentWatcher(), "")
        if not attached:
            run.balance.detach()
            run.balance = Unattached()  # type: ignore[assignment]
        for step in range(3):
            run._step(step)


class Unattached:
    """Takes the place of the ``Balance`` that the lab expects."""

    def loss(self) -> torch.Tensor:
        return torch.zeros(())

    def step(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


def memory(attempts: int) -> dict[str, Any]:
    peaks: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(attempts):
        for attached, megabytes in peaks.items():
            with tempfile.TemporaryDirectory() as folder:
                megabytes.append(peak_megabytes(attached, folder))
    over_plain = ratio(peaks[True], peaks[False])
    return {
        "ratio": over_plain,
        "megabytes_plain": statistics.median(peaks[False]),
        "limit": MEMORY_LIMIT,
        "holds": over_plain["median"] <= MEMORY_LIMIT,
    }


def start(attempts: int) -> dict[str, Any]:
    """Seconds: for CPU time the least of all attempts, because noise only adds to it; for wall clock the median."""

    def timed(*command: str) -> tuple[float, float]:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - began

    commands = {
        "help": ("-m", "equipoise", "--help"),
        "torch": ("-c", "import torch"),
        "torch_and_equipoise": ("-c", "import torch, equipoise"),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(attempts):
        for name, command in commands.items():
            seconds[name].append(timed(*command))
    cpu = {name: min(cpu for cpu, _ in pairs) for name, pairs in seconds.items()}
    wall = {name: statistics.median(wall for _, wall in pairs) for name, pairs in seconds.items()}
    added = cpu["torch_and_equipoise"] - cpu["torch"]
    return {
        "help_cpu_seconds": cpu["help"],
        "help_seconds": wall["help"],
        "added_to_torch_cpu_seconds": added,
        "holds": wall["help"] <= HELP_LIMIT and added <= IMPORT_LIMIT,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=25)
    rounds = options.parse_args().rounds
    torch.set_num_threads(1)  # as runs side by side have; at this size a second thread gains nothing
    with tempfile.TemporaryDirectory() as folder:
        step_rows = steps(Path(folder), rounds)
    for row in step_rows[1:]:
        over, target = row["ratio"], ""
        if row["limit"] is not None:
            target = f"  target {row['limit']}: {'met' if row['holds'] else 'MISSED'}"
        print(f"step   {row['strategy']:46} {over['median']:.3f} ({over['low']:.3f} to {over['high']:.3f}){target}")
    router_rows = routers(rounds)
    for row in router_rows:
        print(
            f"router {row['strategy']:22} {row['tokens']:5} tokens: forward {row['forward']['median']:.3f}, "
            f"with backward {row['forward_and_backward']['median']:.3f}"
        )
    update_rows = [update(*shape, rounds=4 * rounds) for shape in UPDATE_SHAPES]
    for row in update_rows:
        print(
            f"update {row['layers']} x {row['experts']}, {row['tokens']} tokens: {row['milliseconds']:.3f} ms, "
            f"bare operations {row['floor_milliseconds']:.3f} ms, ratio {row['over_floor']['median']:.3f}"
        )
    alert_rows = [alerts(*shape, rounds=4 * rounds) for shape in ALERT_SHAPES]
    for row in alert_rows:
        print(
            f"alerts {row['layers']} x {row['experts']}: {row['milliseconds']:.3f} ms a window, "
            f"{row['milliseconds_judged']:.3f} ms when it judges, mean {row['milliseconds_mean']:.3f} ms"
        )
    collective_rows = [collectives(*UPDATE_SHAPES[0], rounds=4 * rounds)]
    for row in collective_rows:
        print(
            f"ranks  {row['layers']} x {row['experts']}, {row['ranks']} ranks: {row['milliseconds']:.3f} ms, alone "
            f"{row['milliseconds_alone']:.3f} ms, {row['collectives']} of {row['collective_bytes']} bytes"
        )
    memory_row, start_row = memory(MEMORY_ATTEMPTS), start(START_ATTEMPTS)
    print(f"memory {memory_row['ratio']['median']:.3f}; help {start_row['help_seconds']:.2f} s; import adds "
          f"{start_row['added_to_torch_cpu_seconds']:.3f} s")  # fmt: skip
    result = run_facts("python benchmarks/overhead.py", "transformers") | {
        "steps": step_rows,
        "routers": router_rows,
        "updates": update_rows,
        "alerts": alert_rows,
        "collectives": collective_rows,
        "memory": memory_row,
        "start": start_row,
    }
    write_json(STORED, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
