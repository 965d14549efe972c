"""Small trainings under ``transformers.Trainer``, and our own loop over the same micro-batches beside them."""

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
from equipoise.integrations import EquipoiseCallback

LENGTH, BATCH, ACCUMULATED, LR = 12, 2, 4, 0.1


def rows(number: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of one length, with padding and with prompts that are no targets: label tokens differ widely."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(number):
        ids = torch.randint(3, 64, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.int64)
        mask[LENGTH - index % 3 :] = 0
        labels = torch.where(mask == 1, ids, -100)
        labels[: (5 * index) % (LENGTH - 3)] = -100
        found.append({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})
    return found


def batches(data: Sequence[dict[str, list[int]]]) -> list[dict[str, Tensor]]:
    return [
        {key: torch.tensor([row[key] for row in data[start : start + BATCH]]) for key in data[0]}
        for start in range(0, len(data), BATCH)
    ]


def label_tokens(batch: dict[str, Tensor]) -> int:
    return sum(int(label != -100) for row in batch["labels"].tolist() for label in row[1:])


class Watch(TrainerCallback):
    """The gradient of every step, and the biases after it."""

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
    """Ends the training after a step, as an interruption would; the schedule stays that of the whole."""

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
    with tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as place:
        trainer = kind(
            model,
            arguments(place, **options),
            train_dataset=data,
            callbacks=list(callbacks),
            **(trainer_options or {}),
        )
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            trainer.train(resume_from_checkpoint=resume)
    return trainer


def own_loop(
    model: nn.Module,
    data: Any,
    strategy: Sequence[Any],
    *,
    exact: bool = True,
    across: bool = True,
    ranks: int = 1,
    accumulated: int = ACCUMULATED,
    epochs: int = 1,
    autocast: bool = False,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Gradients, biases and loads by step. ``ranks`` of them in this process: micro-batches side by side go together.

    ``exact``: a micro-batch weighs its label tokens of all those of the step, over all ranks (``across``) or over its
    own, which are then averaged. Otherwise: the plain mean over the micro-batches.
    """
    balance = equipoise.attach(model, *strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    gradients, biases, loads = [], [], []
    for _ in range(epochs):
        every = batches(data)
        for start in range(0, len(every), accumulated * ranks):
            window = every[start : start + accumulated * ranks]
            tokens = [label_tokens(batch) for batch in window]
            for first in range(0, len(window), ranks):
                losses = []
                for index in range(first, first + ranks):
                    weight = ranks / len(window)
                    if exact:
                        own = sum(tokens) if across else sum(tokens[index % ranks :: ranks]) * ranks
                        weight = tokens[index] * ranks / own
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
CASES = [(name, *way) for name in ("qwen3_moe", "glm4_moe") for way in ((True, True), (True, False), (False, True))]


def _training(case: tuple[str, bool, bool]) -> tuple[Any, ...]:
    name, exact, across = case
    model, callback = family(name), EquipoiseCallback(*BOTH)
    if not exact:
        model.accepts_loss_kwargs = False
    watch = Watch(callback)
    train(model, rows(24), [callback, watch], average_tokens_across_devices=across)  # a short last window
    callback.detach()
    return watch.gradients, watch.biases, watch.load


def _resumed(folder: str) -> dict[str, Any]:
    """Three steps at once, and with a stop after two; checkpoints are written by the first rank."""
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=1)
    found = {}
    for which, resume in (("whole", None), ("stopped", None), ("resumed", True)):
        callback = EquipoiseCallback(*BOTH)
        watch = Watch(callback)
        place = f"{folder}/{'whole' if which == 'whole' else 'other'}"
        stops = [Stop(2)] if which == "stopped" else []
        train(family("glm4_moe"), rows(48), [callback, watch, *stops], place, resume=resume, **options)
        found[which] = watch.gradients, watch.biases
        callback.detach()
    return found


def _alone(rank: int, folder: str) -> str:
    """The state of a checkpoint is missing on one rank, as on a node without a shared disk."""
    callback = EquipoiseCallback("loss-free")
    attached = family("glm4_moe")
    callback.balance = equipoise.attach(attached, "loss-free")
    place = Path(folder) / "other" / "checkpoint-2"
    try:
        callback._load(place if rank == 0 else place / "nowhere")
    except equipoise.EquipoiseError as error:
        return str(error)
    finally:
        callback.detach()
    return "went on"


def everything(rank: int, folder: str) -> dict[Any, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}  # the process group is there already
    found: dict[Any, Any] = {case: _training(case) for case in CASES}
    found["resumed"] = _resumed(folder)
    dist.barrier()
    found["alone"] = _alone(rank, folder)
    return found
