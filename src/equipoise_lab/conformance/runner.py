"""Asks one installed framework the questions of scenarios, and makes verdicts of its answers.

A scenario of one rank runs in a process of its own kind: all such scenarios one after the other. Those of several ranks
run on gloo. If a process ends or hangs, the scenarios that are left go on in a new one.
"""

import importlib
import importlib.metadata
import math
import multiprocessing
import os
import queue
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from equipoise.errors import UsageError, suggest
from equipoise_lab.conformance.driver import Driver, NotOffered, NotTried, Refuses

__all__ = ["FRAMEWORKS", "Verdict", "ask", "check_name", "driver_of", "run"]

FRAMEWORKS = {  # by the name on the command line, the module and class of its driver
    "equipoise": "equipoise:Equipoise",
    "megatron": "megatron:Megatron",
    "torchtitan": "torchtitan:TorchTitan",
    "olmo_core": "olmo_core:OlmoCore",
    "olmo_core_v2": "olmo_core_v2:OlmoCoreV2",
    "automodel": "automodel:Automodel",
    "litgpt": "litgpt:LitGPT",
    "deepspeed": "deepspeed:DeepSpeed",
    "veomni": "veomni:VeOmni",
    "transformers": "transformers:Transformers",
}
LIMIT = 120  # seconds without an answer until a process is stopped
Kind = Literal["right", "wrong", "refuses", "does not have it", "not tried"]


@dataclass(frozen=True)
class Verdict:
    """What one framework answered to one scenario.

    Attributes:
        kind: right; wrong; refuses, in its words; does not have it; not tried, with the reason.
        right: the right answer, in words; empty unless an answer came.
        got: the answer that came, an error that it raised, its words, what it does not have, or why it was not tried.
        error: how far off, in the unit of the scenario; nan where no number came.
    """

    framework: str
    version: str
    scenario: str
    kind: Kind
    right: str
    got: str
    error: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error if math.isfinite(self.error) else str(self.error)}


def check_name(framework: str) -> None:
    if framework not in FRAMEWORKS and ":" not in framework:
        raise UsageError(
            f"the framework must be one of {', '.join(FRAMEWORKS)}, or the module:Class of a driver: "
            f"got {framework!r}.{suggest(framework, FRAMEWORKS)}"
        )


def driver_of(framework: str) -> type[Driver]:
    """The driver of a framework, which must be installed: by its name, or as ``module:Class``.

    Raises:
        UsageError: there is no driver of that name, or the framework cannot be imported.
    """
    check_name(framework)
    place = f"{__package__}.drivers.{FRAMEWORKS[framework]}" if framework in FRAMEWORKS else framework
    module, _, name = place.partition(":")
    try:
        driver: Any = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{framework} must be installed in this environment: {error}. tests/frameworks/environments lists "
            "what each framework needs."
        ) from error
    if not (isinstance(driver, type) and issubclass(driver, Driver)):
        problem = "is none" if hasattr(sys.modules[module], name) else "does not exist"
        raise UsageError(
            f"a driver must be a class derived from equipoise_lab.conformance.Driver: {name} in {module} {problem}. "
            "Write module:Class."
        )
    return driver


def ask(framework: str, scenario: str, rank: int = 0) -> Verdict:
    """The verdict on one scenario, in this process, on this rank of its group."""
    from equipoise_lab.conformance.scenarios import SCENARIOS

    driver = driver_of(framework)
    version = importlib.metadata.version(driver.PACKAGE)
    start = time.monotonic()
    right, error = "", math.nan
    kind: Kind
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measurement = SCENARIOS[scenario].problem(driver, rank)
        kind = "right" if measurement.is_right else "wrong"
        right, got, error = measurement.right, measurement.got, measurement.error
    except NotOffered as reason:
        kind, got = "does not have it", str(reason)
    except Refuses as reason:
        kind, got = "refuses", str(reason)
    except NotTried as reason:
        kind, got = "not tried", str(reason)
    except Exception as failure:  # of the framework: its user would see it too
        lines = re.sub(r"^\[.*?\] ", "", str(failure).strip()).splitlines() or [""]  # without a place in C++
        kind, got = "wrong", f"{type(failure).__name__}: {lines[0][:200]}"
    return Verdict(framework, version, scenario, kind, right, got, error, round(time.monotonic() - start, 2))


def run(
    framework: str, scenarios: Sequence[str], on_verdict: Callable[[Verdict], None] = lambda verdict: None
) -> list[Verdict]:
    """The verdicts on scenarios, in their order. Each is also given to ``on_verdict`` as soon as it is there."""
    from equipoise_lab.conformance.scenarios import SCENARIOS

    check_name(framework)
    verdicts: dict[str, Verdict] = {}
    for ranks in sorted({SCENARIOS[name].ranks for name in scenarios}):
        left = [name for name in scenarios if SCENARIOS[name].ranks == ranks]
        while left:
            for verdict in _in_processes(framework, left, ranks):
                verdicts[verdict.scenario] = verdict
                on_verdict(verdict)
            left = [name for name in left if name not in verdicts]
    return [verdicts[name] for name in scenarios]


def _in_processes(framework: str, scenarios: Sequence[str], ranks: int) -> Iterator[Verdict]:
    """Verdicts from new processes, one for each rank, until all are there or the processes end.

    Of the verdicts of several ranks, the worst counts. If no answer comes, the first scenario without one is wrong.
    """
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_process, args=(framework, list(scenarios), rank, ranks, folder, answers), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            for name in scenarios:
                parts = list(_answers(answers, ranks, processes, folder))
                if isinstance(parts[-1], UsageError):
                    raise parts[-1]
                if len(parts) == ranks and all(isinstance(part, Verdict) for part in parts):
                    yield max(parts, key=_badness)
                    if ranks > 1 and any(part.kind == "wrong" and math.isnan(part.error) for part in parts):
                        return  # an error on one rank leaves collectives behind, which would spoil the next scenario
                else:
                    words = next((str(part) for part in parts if not isinstance(part, Verdict)), "no answer")
                    yield Verdict(framework, "", name, "wrong", "", words, math.nan, LIMIT)
                    return
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(answers: Any, number: int, processes: Iterable[Any], folder: str) -> Iterator[Any]:
    """So many answers; a sentence in place of one that does not come."""
    end = time.monotonic() + LIMIT
    for _ in range(number):
        while True:
            try:
                yield answers.get(timeout=1.0)
                break
            except queue.Empty:
                if all(process.exitcode is not None for process in processes):
                    lines = [
                        line for log in sorted(Path(folder).glob("*.log")) for line in log.read_text().splitlines()
                    ]
                    yield f"the process ended without an answer: {lines[-1] if lines else 'it printed nothing'}"
                    return
                if time.monotonic() > end:
                    yield f"no answer in {LIMIT} seconds: the ranks wait for each other"
                    return


def _process(framework: str, scenarios: list[str], rank: int, ranks: int, folder: str, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    log = os.open(f"{folder}/{rank}.log", os.O_CREAT | os.O_WRONLY)  # what a framework prints is not an answer
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        driver_of(framework)
    except UsageError as error:
        answers.put(error)
        return
    if ranks > 1:  # as under torchrun
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # not opened: the groups meet in a file
    for number, name in enumerate(scenarios):
        if ranks > 1:
            store = f"file://{folder}/{number}"
            dist.init_process_group("gloo", store, rank=rank, world_size=ranks, timeout=timedelta(seconds=30))
        verdict = ask(framework, name, rank)
        answers.put(verdict)
        if ranks > 1:
            dist.barrier()
            dist.destroy_process_group()


def _badness(verdict: Verdict) -> tuple[int, float]:
    order = ("right", "not tried", "does not have it", "refuses", "wrong")
    return order.index(verdict.kind), math.inf if math.isnan(verdict.error) else verdict.error
