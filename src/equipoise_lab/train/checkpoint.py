"""Saves checkpoints that survive a kill at any moment, and the trained model for plain Transformers.

Rank 0 writes and reads the full state. So a run can be resumed with any number of ranks and any wrapper.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from equipoise.balance import Balance
from equipoise.errors import EquipoiseError
from equipoise.saved import frozen_strategy, read_biases
from equipoise_lab.records import write_json
from equipoise_lab.train.data import end_of_text
from equipoise_lab.train.ranks import ONE_PROCESS, Ranks
from equipoise_lab.train.wrappers import state_to_save

__all__ = ["load_newest", "save", "save_model"]

NUM_KEPT = 2  # the newest, and the one before it in case the newest is damaged


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, balance: Balance) -> dict[str, Any]:
    """The full state, on rank 0. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "balance": balance.state_dict(),
        "random": torch.get_rng_state(),
    }


@contextmanager
def _one_process() -> Iterator[None]:
    """Silences the warning of torch that it saves in a single process: that is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """One line for an error that torch may have wrapped. A wrapped KeyboardInterrupt is raised again as itself."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt from None
    reason = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {reason[0][:100]}"


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    balance: Balance,
    ranks: Ranks = ONE_PROCESS,
) -> None:
    """Writes ``folder/step-N`` under a temporary name, renames it when it is complete, and keeps the newest two."""
    state = _state(model, optimizer, balance)
    ranks.run_on_first(_write, folder, step, state)


def _write(folder: Path, step: int, state: dict[str, Any]) -> None:
    target, temporary = _path(folder, step), folder / f".step-{step:08d}.tmp"
    for old in (temporary, target):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _one_process():
            dcp.save(state, checkpoint_id=temporary, no_dist=True)
        write_json(temporary / "facts.json", {"step": step})
        for file in temporary.iterdir():
            _sync(file)
        temporary.rename(target)
        _sync(folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EquipoiseError(
            f"A checkpoint must be written completely: {target}: {_reason(error)}. The earlier checkpoints are "
            "complete. Make room on the disk and continue with --resume."
        ) from None
    for old in sorted(folder.glob("step-*"))[:-NUM_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    balance_of: Callable[[int], Balance],
    warn: Any,
    ranks: Ranks = ONE_PROCESS,
) -> dict[str, Any] | None:
    """Loads the newest complete checkpoint and returns its facts; None if there is none. Warns of damaged ones.

    ``balance_of(step)`` returns the Balance of ``step``: the state in a checkpoint depends on the strategy.
    """
    steps = ranks.run_on_first(_find_steps, folder)
    for step in steps:
        balance = balance_of(step)
        state = _state(model, optimizer, balance)
        loaded = ranks.run_on_first(_read, _path(folder, step), state, warn)
        if loaded is None:
            continue
        facts, balance_state, random = loaded
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.size > 1)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        balance.load_state_dict(balance_state)
        torch.set_rng_state(random)
        return facts
    if steps:
        ranks.run_on_first(_refuse, folder, len(steps))
    return None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _find_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in the folder, newest first."""
    numbers = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def _read(path: Path, state: dict[str, Any], warn: Any) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor] | None:
    """Fills ``state`` from a checkpoint. Returns its facts, Balance state and random state; None if it is damaged."""
    try:
        facts = json.loads((path / "facts.json").read_text())
        if not isinstance(facts, dict) or path.name != f"step-{facts.get('step', -1):08d}":
            raise ValueError(f"facts.json belongs to another step: {facts}")
        with _one_process():
            dcp.load(state, checkpoint_id=path, no_dist=True)
    except (Exception, CheckpointException) as error:  # torch, json and the disk fail in many ways on a damaged file
        warn(f"checkpoint {path} is damaged ({_reason(error)}); trying the previous one")
        return None
    return facts, state["balance"], state["random"]


def _refuse(folder: Path, num: int) -> None:
    raise EquipoiseError(
        f"A run can only be resumed from a complete checkpoint: all {num} in {folder} are damaged. Restore one, or "
        "remove the run's folder and train again."
    )


def save_model(
    folder: Path, model: nn.Module, balance: Balance, tokenizer_file: Path, ranks: Ranks = ONE_PROCESS
) -> str | None:
    """Saves the trained model for plain Transformers. Returns a note about its biases if the user must know something.

    A family with a bias slot stores its biases in the slot. For other families the biases are in a file beside the
    weights, and ``config.json`` names that file. Plain Transformers then routes without biases;
    ``equipoise.attach(model, "frozen", biases=folder)`` routes with them.
    """
    weights = state_to_save(model)
    return ranks.run_on_first(_save_model, folder, model, weights, balance, tokenizer_file)


def _save_model(
    folder: Path, model: nn.Module, weights: dict[str, Any] | None, balance: Balance, tokenizer_file: Path
) -> str | None:
    from safetensors import SafetensorError

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        note = _write_model(temporary, folder, model, weights, balance, tokenizer_file)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EquipoiseError(
            f"The trained model must be written completely: {folder}: {_reason(error)}. Make room on the disk and "
            "continue with --resume, or add --no-save-model to skip the model."
        ) from None
    return note


def _write_model(
    temporary: Path,
    folder: Path,
    model: nn.Module,
    weights: dict[str, Any] | None,
    balance: Balance,
    tokenizer_file: Path,
) -> str | None:
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(temporary, state_dict=weights)
    end = end_of_text(tokenizer_file)
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token=end).save_pretrained(temporary)
    if balance.save_biases(temporary) is None:
        return None
    multiplies = read_biases(temporary)[1]
    kind, strategy = "multiplicative biases" if multiplies else "biases", frozen_strategy(multiplies)
    return (
        f"{model.config.model_type} has no slot for {kind}: plain Transformers routes {folder} without them; "
        f'equipoise.attach(model, "{strategy}", biases="{folder}") routes with them.'
    )
