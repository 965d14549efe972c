"""What does balancing cost in a training step on one machine? The lab's default model, strategy by strategy.

    python benchmarks/overhead.py    # writes benchmarks/results/overhead.json

Step: runs of the lab that differ by their strategy only take a step each in turn; the ratio over `none` is the median
of rounds, see paired.py. Bars: loss-free 1.01, global-batch loss 1.02, quantile 1.05, and the upper end of the interval
0.02 above.

Router: a window of eight micro-batches of the default model's routers alone, attached over not attached, with the
`loss()` of every micro-batch where there is one; and the same with backwards and the `step()` at the end; for calls of
as many tokens as a step has, and as a micro-batch has. Bar of the forward: 1.05 for `frozen` and `loss-free`, which
count and do no more. Of the loss also its bare operations on the same tensors, without the library: the floor.

Update: `step()` for routers alone, in milliseconds: 64 layers of 256 experts (bar 0.3), half and twice the layers, a
quarter of the experts, and four times the tokens, on which it must not depend.

Alerts: `Alerts.see` a window, with the reading of loads and biases: as usual, where a stretch ends and is judged, and
the mean of all.

Collectives: `step()` of two gloo ranks that pool their counts, over that of the same ranks each for itself, in turn.

Memory: the highest resident set of a process that takes three steps, attached over not attached. Bar: 1.02.

Start: `equipoise --help` (bar 0.5 s), and what `import equipoise` adds to `import torch` (bar 0.1 s).

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
from paired import facts, in_turn, ratio
from torch import nn

import equipoise
from equipoise.alerts import PATIENCE
from equipoise.nn import Router
from equipoise.routing import Routing, score, score_backward
from equipoise_lab.records import read_json, write_json
from equipoise_lab.train.config import Train
from equipoise_lab.train.engine import reproducible
from equipoise_lab.train.loop import _Training
from equipoise_lab.train.run_folder import Nobody

STORED = Path(__file__).parent / "results" / "overhead.json"
BARS = {"loss-free": 1.01, "lbl:scope=global_batch": 1.02, "quantile": 1.05}
OTHERS = ("lbl:scope=sequence", "loss-free+lbl:scope=sequence,coefficient=1e-4")
ROUTER = (128, 32, 4)  # dim, experts, k: the default model's
TOKENS = (8192, 1024)  # of a call: a step's of the default model, and a micro-batch's
LAYERS, MICRO_BATCHES = 3, 8
FORWARD = 1.05
COUNTING = ("frozen", "loss-free")  # whose forward counts and does no more
UPDATE = 0.3  # milliseconds, of the first shape
UPDATES = ((64, 256, 256), (32, 256, 256), (128, 256, 256), (64, 64, 256), (64, 256, 1024))
WATCHED = ((64, 256, 8, 256), (3, 32, 4, 8192))  # layers, experts, k, tokens; the second: the default model's step
RANKS = 2
ATTEMPTS = 5  # processes whose memory and start are measured
MEMORY_ATTEMPTS = 3  # it hardly differs from one to the next
HELP, IMPORT = 0.5, 0.1  # seconds


def steps(folder: Path, rounds: int, **options: Any) -> list[dict[str, Any]]:
    """A row a strategy: the time of a step over that of `none`."""
    strategies = ["none", *BARS, *OTHERS]
    with reproducible():
        runs = {
            name: _Training(Train(out=folder / str(i), strategy=name, steps=rounds + 3, **options), Nobody(), "")
            for i, name in enumerate(strategies)
        }
        counters = dict.fromkeys(runs, 0)

        def step(name: str) -> Callable[[], None]:
            def call() -> None:
                runs[name]._step(counters[name])
                counters[name] += 1

            return call

        took = in_turn({name: step(name) for name in runs}, rounds, warm_up=3)
    rows = []
    for name in strategies[1:]:
        found = ratio(took[name], took["none"])
        bar = BARS.get(name)
        holds = None if bar is None else found["median"] <= bar and found["high"] <= bar + 0.02
        rows.append({"strategy": name, "ratio": found, "limit": bar, "holds": holds})
    return [{"strategy": "none", "seconds": statistics.median(took["none"])}, *rows]


def routers(rounds: int) -> list[dict[str, Any]]:
    """A row a strategy: an attached router over one that is not."""
    dim, experts, k = ROUTER
    rows = []
    for tokens in TOKENS:
        hidden = torch.randn(tokens, dim)
        plain = nn.ModuleList(Router(dim, experts, k) for _ in range(LAYERS)).train()
        rows += [_routers(strategy, plain, hidden, rounds) for strategy in ("frozen", *BARS)]
    return rows


def _routers(strategy: str, plain: nn.ModuleList, hidden: torch.Tensor, rounds: int) -> dict[str, Any]:
    copy = deepcopy(plain)
    balance = equipoise.attach(copy, strategy)
    has_loss = strategy.startswith("lbl")
    counted: list[bool] = []

    def forwards(ours: bool) -> None:
        for _ in range(MICRO_BATCHES):
            for router in copy if ours else plain:
                router(hidden)
            if ours and has_loss:
                balance.loss()
        counted.append(ours)

    def close() -> None:
        if counted.pop():
            balance.step()
        same_biases()

    def same_biases() -> None:
        """Both choose alike: a top-k takes longer or shorter by what it sees."""
        for theirs, ours in zip(plain, copy, strict=True):
            theirs.e_score_correction_bias.copy_(ours.e_score_correction_bias)

    def with_backwards(ours: bool) -> None:
        for _ in range(MICRO_BATCHES):
            loss = sum((router(hidden)[1].square().mean() for router in (copy if ours else plain)), torch.zeros(()))
            (loss + balance.loss() if ours and has_loss else loss).backward()
        counted.append(False)
        if ours:
            balance.step()

    same_biases()
    row: dict[str, Any] = {"strategy": strategy, "tokens": len(hidden)}
    for name, call in (("forward", forwards), ("forward_and_backward", with_backwards)):
        took = in_turn({"attached": partial(call, True), "plain": partial(call, False)}, rounds, between=close)
        row[name] = ratio(took["attached"], took["plain"])
        row[name]["milliseconds_plain"] = 1000 * statistics.median(took["plain"]) / MICRO_BATCHES / len(plain)
    row["milliseconds_bare"] = _bare_loss(plain[0], hidden, rounds) if has_loss else None
    row["limit"] = FORWARD if strategy in COUNTING else None
    row["holds"] = None if row["limit"] is None else row["forward"]["median"] <= FORWARD
    return row


@torch.no_grad()
def _bare_loss(router: Router, hidden: torch.Tensor, rounds: int) -> float:
    """Milliseconds of what the loss of one call must do: count, its value, its gradient. No ops, windows or checks."""
    logits, weights, expert_ids = router(hidden)
    score_function, loss, took = router.router_kind.gate, equipoise.LoadBalancingLoss(), []
    for _ in range(rounds * MICRO_BATCHES * LAYERS):
        started = time.perf_counter()
        load = torch.bincount(expert_ids.reshape(-1), minlength=logits.shape[-1])
        routing = Routing(logits, score(logits, score_function), expert_ids, weights)
        loss.loss(routing, load)
        score_backward(loss.score_gradient(routing, load, 1e-2), logits, routing.scores, score_function)
        took.append(1000 * (time.perf_counter() - started))
    return statistics.median(took)


@torch.no_grad()
def update(layers: int, experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of ``step()``, and of its bare operations on the same tensors: the floor."""
    model = nn.ModuleList(Router(16, experts, 8) for _ in range(layers)).train()
    slots = [router.e_score_correction_bias for router in model]
    balance = equipoise.attach(model, "loss-free")
    hidden, took, floor = torch.randn(tokens, 16), [], []
    for number in range(2 * rounds + 3):
        for router in model:
            router(hidden)
        if number % 2:  # right after the forwards too, where step() begins
            load, bias = torch.stack(list(balance.load.values())), torch.stack(list(balance.biases.values()))
            for router in model:
                router(hidden)
            started = time.perf_counter()
            bare_step(slots, bias, load)
            floor.append(1000 * (time.perf_counter() - started))
        started = time.perf_counter()
        balance.step()
        if not number % 2:
            took.append(1000 * (time.perf_counter() - started))
    return {
        "layers": layers,
        "experts": experts,
        "tokens": tokens,
        "milliseconds": statistics.median(took[2:]),
        "floor_milliseconds": statistics.median(floor[1:]),
    }


def bare_step(slots: list[torch.Tensor], bias: torch.Tensor, load: torch.Tensor) -> None:
    """What Loss-Free's step must do: read what the slots hold, move it, write it. No windows, ranks or checks."""
    torch.equal(torch.stack(slots), bias)
    error = torch.sub(load.sum(-1, keepdim=True), load, alpha=load.shape[-1]).sign_().to(bias.dtype)
    bias.add_(error.sub_(error.mean(-1, keepdim=True)), alpha=1e-3)
    torch._foreach_copy_(slots, bias.unbind())


def alerts(layers: int, experts: int, k: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of ``Alerts.see`` a window."""
    model = nn.ModuleList(Router(16, experts, k) for _ in range(layers)).train()
    balance, watch = equipoise.attach(model, "loss-free"), equipoise.Alerts()
    hidden, took = torch.randn(tokens, 16), []
    for _ in range(max(rounds, 2 * PATIENCE)):
        with torch.no_grad():
            for router in model:
                router(hidden)
        balance.step()
        started = time.perf_counter()
        watch.see(balance.load, 1.0, balance.biases)
        took.append(1000 * (time.perf_counter() - started))
    took = took[PATIENCE : len(took) // PATIENCE * PATIENCE]  # whole stretches, without the first
    judged = took[PATIENCE - 1 :: PATIENCE]
    return {
        "layers": layers,
        "experts": experts,
        "milliseconds": statistics.median(took),
        "milliseconds_judged": statistics.median(judged),
        "milliseconds_mean": statistics.mean(took),
    }


def collectives(layers: int, experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    """`step()` of ranks on this machine that pool, over that of ranks that do not."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_a_rank, (folder, layers, experts, tokens, rounds), nprocs=RANKS)
        return read_json(Path(folder) / "row.json")


def _on_a_rank(rank: int, folder: str, layers: int, experts: int, tokens: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    by_itself = [dist.new_group([other]) for other in range(RANKS)][rank]
    models = {
        name: nn.ModuleList(Router(16, experts, 8) for _ in range(layers)).train() for name in ("pooled", "alone")
    }
    balances = {
        "pooled": equipoise.attach(models["pooled"], "loss-free"),
        "alone": equipoise.attach(models["alone"], "loss-free", group=by_itself),
    }
    hidden = torch.randn(tokens, 16)
    took: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 3):
        for name in models if number % 2 else reversed(models):
            with torch.no_grad():
                for router in models[name]:
                    router(hidden)
            dist.barrier()
            started = time.perf_counter()
            balances[name].step()
            took[name].append(1000 * (time.perf_counter() - started))
    took = {name: milliseconds[3:] for name, milliseconds in took.items()}
    if rank == 0:
        metrics = balances["pooled"].metrics()
        row = {
            "layers": layers,
            "experts": experts,
            "ranks": RANKS,
            "milliseconds": statistics.median(took["pooled"]),
            "milliseconds_alone": statistics.median(took["alone"]),
            "ratio": ratio(took["pooled"], took["alone"]),
            "collectives": int(metrics["collectives"]),
            "collective_bytes": int(metrics["collective_bytes"]),
        }
        write_json(Path(folder) / "row.json", row)
    dist.destroy_process_group()


def peak(attached: bool, folder: str) -> float:
    """Of a process of its own: megabytes."""
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
        run = _Training(Train(out=folder, strategy="lbl:scope=global_batch", steps=3), Nobody(), "")
        if not attached:
            run.balance.detach()
            run.balance = Unattached()  # type: ignore[assignment]
        for step in range(3):
            run._step(step)


class Unattached:
    """Stands where the lab expects a ``Balance``."""

    def loss(self) -> torch.Tensor:
        return torch.zeros(())

    def step(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


def memory(attempts: int) -> dict[str, Any]:
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(attempts):
        for attached, megabytes in found.items():
            with tempfile.TemporaryDirectory() as folder:
                megabytes.append(peak(attached, folder))
    over = ratio(found[True], found[False])
    return {"ratio": over, "megabytes_plain": statistics.median(found[False]), "limit": 1.02,
            "holds": over["median"] <= 1.02}  # fmt: skip


def start(attempts: int) -> dict[str, Any]:
    """Seconds of CPU time, the least of all attempts, which noise only adds to; of the wall, their median."""

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
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(attempts):
        for name, command in commands.items():
            found[name].append(timed(*command))
    cpu = {name: min(cpu for cpu, _ in pairs) for name, pairs in found.items()}
    wall = {name: statistics.median(wall for _, wall in pairs) for name, pairs in found.items()}
    added = cpu["torch_and_equipoise"] - cpu["torch"]
    return {
        "help_cpu_seconds": cpu["help"],
        "help_seconds": wall["help"],
        "added_to_torch_cpu_seconds": added,
        "holds": wall["help"] <= HELP and added <= IMPORT,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=25)
    rounds = options.parse_args().rounds
    torch.set_num_threads(1)  # as runs side by side have; at this size a second thread gains nothing
    with tempfile.TemporaryDirectory() as folder:
        of_steps = steps(Path(folder), rounds)
    for row in of_steps[1:]:
        found = row["ratio"]
        bar = "" if row["limit"] is None else f"  bar {row['limit']}: {'holds' if row['holds'] else 'MISSED'}"
        print(f"step   {row['strategy']:46} {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f}){bar}")
    of_routers = routers(rounds)
    for row in of_routers:
        print(
            f"router {row['strategy']:22} {row['tokens']:5} tokens: forward {row['forward']['median']:.3f}, "
            f"with backward {row['forward_and_backward']['median']:.3f}"
        )
    updates = [update(*shape, rounds=4 * rounds) for shape in UPDATES]
    for row in updates:
        print(
            f"update {row['layers']} x {row['experts']}, {row['tokens']} tokens: {row['milliseconds']:.3f} ms, "
            f"bare operations {row['floor_milliseconds']:.3f} ms"
        )
    of_alerts = [alerts(*shape, rounds=4 * rounds) for shape in WATCHED]
    for row in of_alerts:
        print(
            f"alerts {row['layers']} x {row['experts']}: {row['milliseconds']:.3f} ms a window, "
            f"{row['milliseconds_judged']:.3f} ms where it judges, mean {row['milliseconds_mean']:.3f} ms"
        )
    of_collectives = [collectives(*UPDATES[0], rounds=4 * rounds)]
    for row in of_collectives:
        print(
            f"ranks  {row['layers']} x {row['experts']}, {row['ranks']} ranks: {row['milliseconds']:.3f} ms, alone "
            f"{row['milliseconds_alone']:.3f} ms, {row['collectives']} of {row['collective_bytes']} bytes"
        )
    of_memory, of_start = memory(MEMORY_ATTEMPTS), start(ATTEMPTS)
    print(f"memory {of_memory['ratio']['median']:.3f}; help {of_start['help_seconds']:.2f} s; import adds "
          f"{of_start['added_to_torch_cpu_seconds']:.3f} s")  # fmt: skip
    result = facts("python benchmarks/overhead.py", "transformers") | {
        "steps": of_steps,
        "routers": of_routers,
        "updates": updates,
        "alerts": of_alerts,
        "collectives": of_collectives,
        "memory": of_memory,
        "start": of_start,
    }
    write_json(STORED, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
