"""Parts of `gpu.py`: what balancing costs on a device, experts beside Transformers', and the project's own tests."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import experts
import torch
from gpu_parts import ROOT, Row, Setting, make_row, require_gpu
from operations import STRATEGIES
from paired import in_turn, ratio, stopwatch
from torch import Tensor, nn

import equipoise
from equipoise.nn import Router

LARGE = dict(layers=64, dim=2048, inner=6144, experts=128, k=8, tokens=8192)
SMALL = dict(layers=2, dim=32, inner=64, experts=16, k=4, tokens=64)
ROWS = 2
ROUNDS, SMALL_ROUNDS = 7, 2
SMALL_SHAPES = ((32, 16, 8, 2, 48),)
TESTS = (  # which choose a CUDA device where there is one, by Accelerate, the Trainer or the lab
    "library/test_no_synchronisation.py",  # on fake tensors of CUDA, if torch was built with it
    "test_examples.py",
    "lab/train/test_train.py",
    "library/integrations/test_trainer.py",
)


# ---- what balancing costs ----


class Stack(nn.Module):
    """Layers of a router and, if it has one, an MLP as wide as the experts of a token. All layers share the MLP."""

    def __init__(self, layers: int, dim: int, experts: int, k: int, mlp: nn.Module | None):
        super().__init__()
        self.routers = nn.ModuleList(Router(dim, experts, k, score_function="softmax") for _ in range(layers))
        self.mlp = mlp

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        hidden, total = inputs_embeds, inputs_embeds.new_zeros((), dtype=torch.float32)
        for router in self.routers:
            _, weights, _ = router(hidden)
            if self.mlp is None:
                total = total + weights.square().mean()
            else:
                hidden = hidden + self.mlp(hidden) * weights[:, :1].to(hidden.dtype).view(*hidden.shape[:-1], 1)
        return total + hidden.float().square().mean()


def make_stack(sizes: dict[str, int], has_mlp: bool, device: torch.device) -> Stack:
    torch.manual_seed(0)
    mlp = None
    if has_mlp:
        up, down = (
            nn.Linear(*shape, bias=False) for shape in ((sizes["dim"], sizes["inner"]), (sizes["inner"], sizes["dim"]))
        )
        mlp = nn.Sequential(up, nn.ReLU(), down).to(device, torch.bfloat16)
    return Stack(sizes["layers"], sizes["dim"], sizes["experts"], sizes["k"], mlp).to(device).train()


def make_step(model: Stack, balance: equipoise.Balance | None, hidden: Tensor) -> Callable[[], None]:
    def step() -> None:
        loss = model(inputs_embeds=hidden)
        if balance is not None:
            loss = loss + balance.loss()
        loss.backward()
        if balance is not None:
            balance.step()
        model.zero_grad()

    return step


def count_launches(step: Callable[[], None], device: torch.device) -> int | None:
    """Kernels, copies and fills of one step; None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int | None:
    """The most memory that tensors took in one step; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure_overhead(setting: Setting, strategy: str, has_mlp: bool, fused: bool) -> Row:
    """A step of an attached stack over one of the plain stack, in turn."""
    sizes, rounds = (SMALL, SMALL_ROUNDS) if setting.small else (LARGE, ROUNDS)
    plain = make_stack(sizes, has_mlp, setting.device)
    shared = {} if plain.mlp is None else {id(plain.mlp): plain.mlp}  # not copied
    model = deepcopy(plain, shared)
    balance = equipoise.attach(model, strategy, fused=fused)
    shape = ROWS, sizes["tokens"] // ROWS, sizes["dim"]
    hidden = torch.randn(shape, device=setting.device, dtype=torch.bfloat16)
    steps = {"plain": make_step(plain, None, hidden), "attached": make_step(model, balance, hidden)}
    seconds = in_turn(steps, rounds, seconds_of=stopwatch(setting.device))
    launches = {name: count_launches(step, setting.device) for name, step in steps.items()}
    peak = {name: peak_bytes(step, setting.device) for name, step in steps.items()}

    def added(values: dict[str, int | None]) -> int | None:
        return None if values["plain"] is None else values["attached"] - values["plain"]

    return {
        "ratio": ratio(seconds["attached"], seconds["plain"]),
        "plain, ms": 1000 * statistics.median(seconds["plain"]),
        "attached, ms": 1000 * statistics.median(seconds["attached"]),
        "launches added": added(launches),
        "launches, plain": launches["plain"],
        "bytes added": added(peak),
        "bytes, plain": peak["plain"],
    }


def overhead(setting: Setting) -> Iterator[Row]:
    for has_mlp in (False, True):
        for strategy, fused in product(STRATEGIES, (False, True) if setting.has_gpu else (False,)):
            what = f"{strategy}{', fused' if fused else ''}, {'in a stack of products' if has_mlp else 'routers only'}"
            yield make_row(what, partial(measure_overhead, setting, strategy, has_mlp, fused))


# ---- experts ----


def measure_experts(setting: Setting, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Row:
    row = experts.measure(shape, dtype, SMALL_ROUNDS if setting.small else ROUNDS, setting.device)
    names = ("ours_over_best_stock", "ours_over_dense", "best_stock_over_dense")
    figures: dict[str, Any] = {name.replace("_", " "): row[name] for name in names}
    return {"best stock": row["best_stock"], "ours, ms": row["milliseconds"]["ours"], **figures}


def experts_of_transformers(setting: Setting) -> Iterator[Row]:
    for shape in SMALL_SHAPES if setting.small else experts.SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            what = "D {}, F {}, E {}, k {}, {} tokens, ".format(*shape) + str(dtype).removeprefix("torch.")
            yield make_row(what, partial(measure_experts, setting, shape, dtype))


# ---- the project's own tests ----


def run_tests(setting: Setting, file: str) -> Row:
    require_gpu(setting)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        workers = str(min(4, os.cpu_count() or 1))
        options = ["-q", "-n", workers, "--dist", "loadgroup", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report: {(done.stderr or done.stdout)[-300:]}")
        return read_report(report)


def read_report(report: Path) -> Row:
    """The numbers of a JUnit file. Raises ``AssertionError`` with the names of tests that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    if failed or not cases:
        raise AssertionError(f"{len(failed)} of {len(cases)} tests failed: {', '.join(map(str, failed))}")
    return {"passed": len(cases) - skipped, "skipped": skipped}


def own_tests(setting: Setting) -> Iterator[Row]:
    for file in TESTS:
        yield make_row(file, partial(run_tests, setting, file))
