"""Small trainings under ``transformers.Trainer``, and our own loop over the same micro-batches to compare with."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import family
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import equipoise
from equipoise import Alerts
from equipoise.integrations import EquipoiseCallback
from equipoise.integrations.trainer.checkpoints import load_state

LENGTH, BATCH, ACCUMULATED, LR = 12, 2, 4, 0.1


def rows(number: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of one length with padding and with prompts that are no targets. Their numbers of label tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for index in range(number):
        ids = torch.randint(3, 64, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.int64)
        mask[LENGTH - index % 3 :] = 0
        labels = torch.where(mask == 1, ids, -100)
        labels[: (5 * index) % (LENGTH - 3)] = -100
        data.append({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})
    return data


def batches(data: Sequence[dict[str, list[int]]]) -> list[dict[str, Tensor]]:
    return [
        {key: torch.tensor([row[key] for row in data[start : start + BATCH]]) for key in data[0]}
        for start in range(0, len(data), BATCH)
    ]


def label_tokens(batch: dict[str, Tensor]) -> int:
    return sum(int(label != -100) for row in batch["labels"].tolist() for label in row[1:])


class Watch(TrainerCallback):
    """Records the gradient of every step, and the biases and the load after it."""

    def __init__(self, callback: EquipoiseCallback | None = None):
        self.callback = callback
        self.gradients: list[dict[str, Tensor]] = []
        self.biases: list[dict[str, Tensor]] = []
        self.load: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, **kwargs):
        if self.callback is not None and self.callback.balance is not None:
            self.biases.append(self.callback.balance.biases)
            self.load.append(self.callback.balance.load)


class Stop(TrainerCallback):
    """Ends the training after a step, as an interruption does. The schedule stays the one of the full training."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    standard: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    return TrainingArguments(**(standard | options))


def train(
    model: nn.Module,
    data: Any,
    callbacks: Sequence[Any],
    folder: Any = None,
    *,
    kind: type[Trainer] = Trainer,
    resume: Any = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    with tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as output_dir:
        trainer = kind(
            model,
            arguments(output_dir, **options),
            train_dataset=data,
            callbacks=list(callbacks),
            **(trainer_options or {}),
        )
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            trainer.train(resume_from_checkpoint=resume)
    return trainer


def own_loop(
    model: nn.Module,
    data: Any,
    strategy: Sequence[Any],
    *,
    by_label_tokens: bool = True,
    across_ranks: bool = True,
    ranks: int = 1,
    accumulated: int = ACCUMULATED,
    epochs: int = 1,
    autocast: bool = False,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Gradients, biases and loads by step. One process does the work of ``ranks``.

    ``by_label_tokens``: a micro-batch weighs by its share of the step's label tokens: those of all ranks with
    ``across_ranks``, otherwise those of its own rank, and the ranks are averaged. Without it: the mean over the
    micro-batches.
    """
    balance = equipoise.attach(model, *strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    gradients, biases, loads = [], [], []
    for _ in range(epochs):
        micro_batches = batches(data)
        for start in range(0, len(micro_batches), accumulated * ranks):
            window = micro_batches[start : start + accumulated * ranks]
            tokens = [label_tokens(batch) for batch in window]
            for first in range(0, len(window), ranks):
                losses = []
                for index in range(first, first + ranks):
                    weight = ranks / len(window)
                    if by_label_tokens:
                        total = sum(tokens) if across_ranks else sum(tokens[index % ranks :: ranks]) * ranks
                        weight = tokens[index] * ranks / total
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = model(**window[index]).loss
                    losses.append(weight / ranks * (loss + balance.loss()))
                sum(losses).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
            balance.step()
            biases.append(balance.biases)
            loads.append(balance.load)
    balance.detach()
    return gradients, biases, loads


# ---- on ranks ----

BOTH = ("loss-free:rate=1e-2", "lbl:coefficient=1e-1")
WEIGHTS = ((True, True), (True, False), (False, True))  # by_label_tokens, across_ranks
CASES = [(name, *weight) for name in ("qwen3_moe", "glm4_moe") for weight in WEIGHTS]


def _training(case: tuple[str, bool, bool]) -> tuple[Any, ...]:
    name, by_label_tokens, across_ranks = case
    model, callback = family(name), EquipoiseCallback(*BOTH)
    if not by_label_tokens:
        model.accepts_loss_kwargs = False
    watch = Watch(callback)
    train(model, rows(24), [callback, watch], average_tokens_across_devices=across_ranks)  # a short last window
    callback.detach()
    return watch.gradients, watch.biases, watch.load


def _resumed(folder: str) -> dict[str, Any]:
    """Gradients and biases of three steps at once, and of three with a stop after two. Rank 0 saves."""
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=1)
    results = {}
    for training, resume in (("whole", None), ("stopped", None), ("resumed", True)):
        callback = EquipoiseCallback(*BOTH)
        watch = Watch(callback)
        output_dir = f"{folder}/{'whole' if training == 'whole' else 'stopped'}"
        stops = [Stop(2)] if training == "stopped" else []
        train(family("glm4_moe"), rows(48), [callback, watch, *stops], output_dir, resume=resume, **options)
        results[training] = watch.gradients, watch.biases
        callback.detach()
    return results


def _error_of_a_missing_state(rank: int, folder: str) -> str:
    """Rank 1 does not have the state of the checkpoint, as on a node without a shared disk."""
    checkpoint = Path(folder) / "stopped" / "checkpoint-2"
    model = family("glm4_moe")
    balance = equipoise.attach(model, "loss-free")
    try:
        load_state(checkpoint if rank == 0 else checkpoint / "nowhere", balance, Alerts())
    except equipoise.EquipoiseError as error:
        return str(error)
    finally:
        balance.detach()
    return "no error"


def everything(rank: int, folder: str) -> dict[Any, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}  # the process group exists already
    results: dict[Any, Any] = {case: _training(case) for case in CASES}
    results["resumed"] = _resumed(folder)
    dist.barrier()
    results["missing on rank 1"] = _error_of_a_missing_state(rank, folder)
    return results
