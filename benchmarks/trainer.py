"""How fast is the lab beside transformers.Trainer? Tokens per second of the same model on the same batches.

    python benchmarks/trainer.py    # writes benchmarks/results/trainer.json

Both train the lab's default model, unattached, from the same weights on the same micro-batches of the packaged corpus.
Both use the same number of micro-batches per step, AdamW, clipping, and bfloat16 autocast if the machine has it. The
Trainer's model is as Transformers makes it: experts by `grouped_mm`, attention by `sdpa`. The sides run in turn, each
in its own processes. The first two steps are not timed. A third side, the lab with the experts of Transformers, shows
how much the lab's experts gain. Target: the lab at least 1.5 times as fast as the Trainer. The last line on stdout is
the result as JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as the command line does

import torch
from paired import ratio, run_facts
from torch.utils.data import IterableDataset

from equipoise_lab.records import write_json
from equipoise_lab.train import engine
from equipoise_lab.train.config import Train
from equipoise_lab.train.loop import _Training
from equipoise_lab.train.run_folder import SilentWatcher

STORED = Path(__file__).parent / "results" / "trainer.json"
SIDES = ("trainer", "lab", "lab_with_grouped_mm")
WARM_UP = 2
LIMIT = 1.5


def config(steps: int, folder: Path) -> Train:
    return Train(out=folder / "run", strategy="none", steps=steps)


class Sequences(IterableDataset):
    """The lab's training text, sequence by sequence, in the order of its micro-batches."""

    def __init__(self, training: _Training, steps: int):
        self.rows = [
            row
            for step in range(steps)
            for micro_batch in training.batches.window(step)
            for row in micro_batch.input_ids.clone()
        ]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"input_ids": row, "labels": row} for row in self.rows)


def lab(steps: int, folder: Path, side: str) -> tuple[list[float], list[float]]:
    """Seconds and training loss of every step."""
    with engine.reproducible():
        training = _Training(config(steps, folder), SilentWatcher(), "")
        if side == "lab_with_grouped_mm":
            training.inner.set_experts_implementation("grouped_mm")
        seconds, losses = [], []
        for step in range(steps):
            started = time.perf_counter()
            losses.append(training._step(step)["loss"])
            seconds.append(time.perf_counter() - started)
    return seconds, losses


def trainer(steps: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds and training loss of every step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    lab_config = config(steps, folder)
    training = _Training(lab_config, SilentWatcher(), "")
    training.balance.detach()
    model: Any = training.inner
    model.set_experts_implementation("grouped_mm")
    model.set_attn_implementation("sdpa")

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **names: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **names: Any) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=lab_config.sequences,
        gradient_accumulation_steps=lab_config.micro_batches,
        learning_rate=lab_config.learning_rate,
        weight_decay=lab_config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=lab_config.clip,
        warmup_steps=int(lab_config.warmup * steps),
        lr_scheduler_type="cosine",
        bf16=training.autocast,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    hf_trainer = Trainer(model, arguments, train_dataset=Sequences(training, steps), callbacks=[Clock()])
    hf_trainer.train()
    losses = [row["loss"] for row in hf_trainer.state.log_history if "loss" in row]
    return [b - a for a, b in itertools.pairwise(times)], losses


def measure(side: str, steps: int) -> dict[str, Any]:
    """Median seconds of a step after the warm-up, and the loss of every step, in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds, losses = trainer(steps, folder) if side == "trainer" else lab(steps, folder, side)
    return {"side": side, "seconds": statistics.median(seconds[WARM_UP:]), "losses": losses}


def measure_in_new_process(side: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", side, "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--only", choices=SIDES, help="measure one side, in this process")
    arguments = options.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.steps)))
        return
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {}
    for round_number in range(arguments.rounds):
        for side in SIDES if round_number % 2 == 0 else reversed(SIDES):
            row = measure_in_new_process(side, arguments.steps)
            seconds[side].append(row["seconds"])
            losses[side] = row["losses"]
    lab_config = config(arguments.steps, Path())
    tokens = lab_config.micro_batches * lab_config.sequences * lab_config.sequence_length
    rows = [
        {
            "side": side,
            "tokens_per_second": round(tokens / statistics.median(seconds[side])),
            "over_trainer": ratio(seconds["trainer"], seconds[side]),
            "losses": [round(loss, 4) for loss in losses[side]],
        }
        for side in SIDES
    ]
    for row in rows:
        over = row["over_trainer"]
        print(
            f"{row['side']:24} {row['tokens_per_second']:7} tokens/s  {over['median']:.2f} times the Trainer "
            f"({over['low']:.2f} to {over['high']:.2f})"
        )
    result = run_facts("python benchmarks/trainer.py", "transformers", "accelerate") | {
        "tokens_per_step": tokens,
        "limit": LIMIT,
        "holds": rows[1]["over_trainer"]["median"] >= LIMIT,
        "rows": rows,
    }
    write_json(STORED, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
