"""Where does a training step of the lab go, and what are its remedies worth? The lab's default model, one thread.

    python benchmarks/lab_step.py    # writes benchmarks/results/lab_step.json

Parts: the calls of a step are timed where they are made, under the global-batch loss, which uses all that balancing
has. *forward* has the loss of the text, and the counting at the routers; *balancing* is `loss()`, `step()` and
`metrics()`; *records* is what a run writes of a step; *rest* is the step less all of these. A share is that of the sum
over all steps, so shares add up to one; a time is the median over steps.

Run: what evaluations, checkpoints and the end of a run take, shared out over the steps of a default run.

Remedies, each against the lab as it is (one thread, its own precision, freed memory kept, eager), in turn, see
paired.py: freed memory given back (processes of their own, with the page faults of a step), two threads, the other
precision, and compiled decoder layers (a process of its own, without torch's cache of compiled code). A ratio above 1
says that the lab's way is the quicker one. What cannot be compiled is told with its error. A compiled model's time to
compile is that of its first step less its median step, and not in the ratio.

How many cores other programs took meanwhile is told too: it should be near 0.

The last line on stdout is the result as JSON.
"""

import argparse
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as the command line does

import torch
from paired import Others, facts, in_turn, ratio
from torch import nn

from equipoise_lab.records import write_json
from equipoise_lab.train import checkpoint, engine
from equipoise_lab.train import train as lab_train
from equipoise_lab.train.config import Train
from equipoise_lab.train.loop import _Training
from equipoise_lab.train.run_folder import Nobody

STORED = Path(__file__).parent / "results" / "lab_step.json"
STRATEGY = "lbl:scope=global_batch"
PARTS = ("data", "forward", "backward", "clipping", "optimizer", "balancing", "records", "rest")
WARM_UP = 2
MEMORY = ("kept", "given_back")
QUESTIONS = ("parts", *MEMORY, "in_turn", "compiled")


def config(steps: int, folder: Path, **options: Any) -> Train:
    return Train(**{"out": folder, "strategy": STRATEGY, "steps": steps} | options)


def started(asked: Train) -> _Training:
    return _Training(asked, Nobody(), "")


class Clock:
    """Seconds of what is called, by part. A call inside another one is the outer one's."""

    def __init__(self) -> None:
        self.took = dict.fromkeys(PARTS, 0.0)
        self._inside = False

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **names: Any) -> Any:
            if self._inside:
                return call(*arguments, **names)
            self._inside, began = True, time.perf_counter()
            try:
                return call(*arguments, **names)
            finally:
                self._inside = False
                self.took[part] += time.perf_counter() - began

        return timed

    @contextmanager
    def on(self, training: _Training) -> Iterator[None]:
        """Times the calls of its steps."""
        calls: list[tuple[Any, str, str]] = [
            (training.batches, "window", "data"),
            (lab_train, "language_model_loss", "forward"),
            (torch.Tensor, "backward", "backward"),
            (nn.utils, "clip_grad_norm_", "clipping"),
            (training.optimizer, "step", "optimizer"),
            (training.optimizer, "zero_grad", "optimizer"),
            *((training.balance, name, "balancing") for name in ("loss", "step", "metrics")),
        ]
        before = [(owner, name, vars(owner).get(name)) for owner, name, _ in calls]
        for owner, name, part in calls:
            setattr(owner, name, self.timed(part, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, value in before:
                if value is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


def step_by_part(training: _Training, step: int) -> dict[str, float]:
    """Seconds of one step, as a run takes it, by part; "all" is the whole."""
    clock, began = Clock(), time.perf_counter()
    with clock.on(training):
        row = training._step(step)
    of_records = time.perf_counter()
    training.folder.step(row, [load.tolist() for load in training.balance.load.values()])
    ended = time.perf_counter()
    clock.took["records"] = ended - of_records
    clock.took["rest"] = ended - began - sum(clock.took.values())
    return {**clock.took, "all": ended - began}


def parts(steps: list[dict[str, float]]) -> dict[str, Any]:
    """
    >>> found = parts([{**dict.fromkeys(PARTS, 1.0), "all": 8.0}, {**dict.fromkeys(PARTS, 3.0), "all": 24.0}])
    >>> found["seconds"], found["parts"][0], found["seconds_of_parts"]
    (16.0, {'part': 'data', 'seconds': 2.0, 'share': 0.125}, 16.0)
    """
    whole = sum(step["all"] for step in steps)
    rows = [
        {
            "part": part,
            "seconds": statistics.median(step[part] for step in steps),
            "share": sum(step[part] for step in steps) / whole,
        }
        for part in PARTS
    ]
    return {
        "steps": len(steps),
        "seconds": statistics.median(step["all"] for step in steps),
        "seconds_of_parts": sum(row["seconds"] for row in rows),  # medians need not add up
        "parts": rows,
    }


def over_a_run(seconds: dict[str, float], step: float, asked: Train) -> list[dict[str, Any]]:
    """A row for everything that a run does beside its steps: how often, and its seconds shared out over the steps."""
    evaluations = (asked.steps - 1) // asked.evaluate_every if asked.evaluate_every else 0
    times = {
        "evaluation, selection text": evaluations + 1,  # one at the end
        "checkpoint": (asked.steps - 1) // asked.checkpoint_every,
        "last evaluation, test text, by token": 1,
        "model, audit and result": 1,
    }
    return [
        {
            "what": what,
            "seconds": seconds[what],
            "times": times[what],
            "seconds_a_step": seconds[what] * times[what] / asked.steps,
            "over_step": seconds[what] * times[what] / asked.steps / step,
        }
        for what in times
    ]


def where(asked: Train) -> dict[str, Any]:
    """Trains a run of so many steps; where its steps went, and what the rest of it took."""
    with engine.reproducible():
        training = started(asked)
        training.folder.begin(0)
        taken = [step_by_part(training, step) for step in range(asked.steps)]
        found = parts(taken[WARM_UP:])
        others: dict[str, list[float]] = {}

        def timed(what: str, call: Callable[..., Any], *arguments: Any, **names: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments, **names)
            others.setdefault(what, []).append(time.perf_counter() - began)
            return result

        def save(step: int) -> None:
            training.folder.sync()
            checkpoint.save(
                training.folder.checkpoints, step, training.inner, training.optimizer, training.balance, training.ranks
            )

        for number in range(3):
            timed("checkpoint", save, asked.steps - 2 + number)
        evaluate = training._evaluate
        names = {"selection": "evaluation, selection text", "test": "last evaluation, test text, by token"}
        timed(names["selection"], evaluate, "selection")
        training._evaluate = lambda split, **named: timed(names[split], evaluate, split, **named)  # type: ignore
        timed("end", training._finish)
    (end,) = others.pop("end")
    others["model, audit and result"] = [end - sum(others[name][-1] for name in names.values())]
    seconds = {name: statistics.median(values) for name, values in others.items()}
    default = Train(out=asked.out)
    tokens = asked.micro_batches * asked.sequences * asked.sequence_length
    rows = over_a_run(seconds, found["seconds"], default)
    return {
        "strategy": asked.strategy,
        "dtype": "bfloat16" if training.autocast else "float32",
        "tokens_per_step": tokens,
        "step": found,
        "run": {
            "steps": default.steps,
            "evaluate_every": default.evaluate_every,
            "checkpoint_every": default.checkpoint_every,
            "rows": rows,
        },
    }


def memory(asked: Train, kept: bool) -> dict[str, Any]:
    """Seconds and minor page faults of a step, medians, in this process."""
    if not kept:
        engine.keep_freed_memory = lambda: None
    seconds, faults = [], []
    with engine.reproducible():
        training = started(asked)
        for step in range(asked.steps):
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            training._step(step)
            seconds.append(time.perf_counter() - began)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {"seconds": statistics.median(seconds[WARM_UP:]), "minor_faults": statistics.median(faults[WARM_UP:])}


def one_after_another(training: _Training) -> Callable[[], None]:
    """A call that takes its next step."""
    steps = iter(range(training.config.steps))
    return lambda: void(training._step(next(steps)))


def void(_: Any) -> None: ...


def other_precision() -> tuple[str, str]:
    """The lab's own on this machine, and the other one."""
    own = "bfloat16" if engine.machine("auto")[1] else "float32"
    return own, "float32" if own == "bfloat16" else "bfloat16"


def threads_and_precision(folder: Path, rounds: int, **options: Any) -> list[dict[str, Any]]:
    own, other = other_precision()
    make = partial(config, rounds + WARM_UP, **options)
    with engine.reproducible():
        step = {
            "as it is": one_after_another(started(make(folder / "own", dtype=own))),
            "two threads": one_after_another(started(make(folder / "threads", dtype=own))),
            other: one_after_another(started(make(folder / "other", dtype=other))),
        }
        one_thread = step["two threads"]

        def two_threads() -> None:
            torch.set_num_threads(2)
            try:
                one_thread()
            finally:
                torch.set_num_threads(1)

        took = in_turn({**step, "two threads": two_threads}, rounds, WARM_UP)
    return [
        {
            "remedy": remedy,
            "lab": lab,
            "other": name,
            "seconds_lab": statistics.median(took["as it is"]),
            "seconds_other": statistics.median(took[name]),
            "ratio": ratio(took[name], took["as it is"]),
        }
        for remedy, lab, name in (("threads", "one thread", "two threads"), ("precision", own, other))
    ]


def compiled(folder: Path, rounds: int, **options: Any) -> list[dict[str, Any]]:
    """A row a way to compile: over the same model, uncompiled, in the lab's precision and in float32."""
    own, _ = other_precision()
    ways = {
        f"{own}, the lab's experts": (own, None),
        f"{own}, grouped_mm of Transformers": (own, "grouped_mm"),
        "float32, the lab's experts": ("float32", None),
    }
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # an error is in the result
    rows: list[dict[str, Any]] = []
    with engine.reproducible():
        runs: dict[str, Callable[[], None]] = {}
        for number, (way, (dtype, experts)) in enumerate(ways.items()):
            asked = config(rounds + WARM_UP + 1, folder / str(number), **options, dtype=dtype)
            if dtype not in runs:
                runs[dtype] = one_after_another(started(replace(asked, out=folder / dtype)))
            training = started(asked)
            if experts is not None:
                training.inner.set_experts_implementation(experts)
            step, began = one_after_another(training), time.perf_counter()
            rows.append(row := {"remedy": "compiled", "way": way, "dtype": dtype, "error": None})
            try:
                compile_layers(training)
                step()
            except Exception as error:
                row["error"] = why(error)
                continue
            row["first_step_seconds"] = time.perf_counter() - began
            runs[way] = step
        took = in_turn(runs, rounds, WARM_UP)
    for row in rows:
        if row["error"] is None:
            seconds, eager_seconds = took[row["way"]], took[row["dtype"]]
            row |= {
                "compile_seconds": row.pop("first_step_seconds") - statistics.median(seconds),
                "seconds_lab": statistics.median(eager_seconds),
                "seconds_other": statistics.median(seconds),
                "ratio": ratio(seconds, eager_seconds),
            }
    return rows


def compile_layers(training: _Training) -> None:
    for layer in training.inner.model.layers:
        layer.compile()


def why(error: Exception) -> str:
    """The kind of an error and what it says, in a line.

    >>> why(RuntimeError("in a fake tensor call: got ValueError('two types'). Hint: none"))
    'RuntimeError: two types'
    """
    said = re.search(r"got \w+\(['\"](.*?)['\"]\)", str(error))
    return f"{type(error).__name__}: {said[1] if said else str(error).strip().splitlines()[0][:200]}"


def answer(question: str, rounds: int) -> Any:
    """In this process."""
    torch.set_num_threads(1)  # as runs side by side have
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if question == "parts":
            return where(config(12 + WARM_UP, folder / "run"))
        if question in MEMORY:
            return memory(config(4 + WARM_UP, folder / "run"), kept=question == "kept")
        if question == "in_turn":
            return threads_and_precision(folder, rounds)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # what was compiled before is not found
        return compiled(folder, rounds)


def one_process(question: str, rounds: int) -> Any:
    command = [sys.executable, __file__, "--only", question, "--rounds", str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def kept_memory(processes: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {which: [] for which in MEMORY}
    for number in range(processes):
        for which in MEMORY if number % 2 == 0 else reversed(MEMORY):
            found[which].append(one_process(which, 1))
    seconds = {which: [row["seconds"] for row in rows] for which, rows in found.items()}
    faults = {which: statistics.median(row["minor_faults"] for row in rows) for which, rows in found.items()}
    return {
        "remedy": "freed memory",
        "lab": "kept",
        "other": "given back",
        "seconds_lab": statistics.median(seconds["kept"]),
        "seconds_other": statistics.median(seconds["given_back"]),
        "ratio": ratio(seconds["given_back"], seconds["kept"]),
        "minor_faults_lab": faults["kept"],
        "minor_faults_other": faults["given_back"],
    }


def table(result: dict[str, Any]) -> str:
    step, run = result["step"], result["run"]
    others = "?" if result["cores_of_others"] is None else f"{result['cores_of_others']:.2f}"
    lines = [f"{result['hardware']}; other programs took {others} cores meanwhile"]
    lines += [f"a step of {result['strategy']}, {result['dtype']}: {step['seconds']:.3f} s"]
    lines += [f"  {row['part']:36} {row['seconds']:7.4f} s  {row['share']:6.1%}" for row in step["parts"]]
    lines.append(f"  {'medians of the parts together':36} {step['seconds_of_parts']:7.4f} s")
    lines.append(f"beside the steps of a run of {run['steps']}")
    lines += [
        f"  {row['what']:36} {row['seconds']:7.2f} s x {row['times']} = {row['over_step']:6.1%} of a step, each step"
        for row in run["rows"]
    ]
    lines.append("remedies: time of the other way over that of the lab")
    for row in result["remedies"]:
        what = f"{row['other']} over {row['lab']}"
        faults = ""
        if "minor_faults_lab" in row:
            faults = f"  page faults a step {row['minor_faults_other']:.0f}, {row['minor_faults_lab']:.0f}"
        lines.append(f"  {what:36} {_shown(row['ratio'])}{faults}")
    for row in result["compiled"]:
        told = row["error"] or f"{_shown(row['ratio'])}  compiled in {row['compile_seconds']:.0f} s"
        lines.append(f"  compiled, {row['way']:36} {told}")
    return "\n".join(lines)


def _shown(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--processes", type=int, default=3, help="with freed memory kept, and as many without")
    options.add_argument("--only", choices=QUESTIONS, help="one question, in this process")
    given = options.parse_args()
    if given.only:
        print(json.dumps(answer(given.only, given.rounds)))
        return
    torch.set_num_threads(1)
    others = Others()
    found = one_process("parts", given.rounds)
    remedies = [kept_memory(given.processes), *one_process("in_turn", given.rounds)]
    result = facts("python benchmarks/lab_step.py", "transformers") | found
    result |= {"remedies": remedies, "compiled": one_process("compiled", given.rounds)}
    result["cores_of_others"] = others.cores()
    write_json(STORED, result)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
