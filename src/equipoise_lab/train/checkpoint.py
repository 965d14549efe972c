"""Checkpoints that survive a kill at any moment, and the model that leaves for plain Transformers.

Rank 0 writes and reads the whole state, so that a run goes on with any number of ranks and any wrapper.
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
from equipoise_lab.train.ranks import ALONE, Ranks
from equipoise_lab.train.wrappers import state_to_save

__all__ = ["load_newest", "save", "save_model"]

KEPT = 2  # the newest, and the one before it in case the newest is damaged


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, balance: Balance) -> dict[str, Any]:
    """The whole state, on rank 0; collective."""
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
    """torch warns that it saves in a single process; that is what is asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """One line for whatever torch wraps an error in; Ctrl-C, which it wraps too, goes on as Ctrl-C."""
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
    ranks: Ranks = ALONE,
) -> None:
    """Writes ``folder/step-N`` aside and renames it when it is whole; keeps the newest two."""
    state = _state(model, optimizer, balance)
    ranks.first(_write, folder, step, state)


def _write(folder: Path, step: int, state: dict[str, Any]) -> None:
    target, aside = _path(folder, step), folder / f".step-{step:08d}.tmp"
    for old in (aside, target):
        shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with _one_process():
            dcp.save(state, checkpoint_id=aside, no_dist=True)
        write_json(aside / "facts.json", {"step": step})
        for file in aside.iterdir():
            _sync(file)
        aside.rename(target)
        _sync(folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise EquipoiseError(
            f"A checkpoint must be written whole: {target}: {_reason(error)}. The checkpoints before it are whole; "
            "make room on the disk and resume with --resume."
        ) from None
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    balance_of: Callable[[int], Balance],
    warn: Any,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Takes up the newest whole checkpoint and returns its facts; None if there is none. A damaged one is named.

    ``balance_of(step)`` is what balances ``step``: the state that a checkpoint holds depends on the strategy.
    """
    found = ranks.first(_find, folder)
    for step in found:
        balance = balance_of(step)
        state = _state(model, optimizer, balance)
        read = ranks.first(_read, _path(folder, step), state, warn)
        if read is None:
            continue
        facts, balance_state, random = read
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.size > 1)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        balance.load_state_dict(balance_state)
        torch.set_rng_state(random)
        return facts
    if found:
        ranks.first(_refuse, folder, len(found))
    return None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _find(folder: Path) -> list[int]:
    """The steps of the checkpoints that are there, newest first."""
    numbers = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def _read(path: Path, state: dict[str, Any], warn: Any) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor] | None:
    """Fills ``state`` from a checkpoint; its facts, and what every rank needs all of. None where it is damaged."""
    try:
        facts = json.loads((path / "facts.json").read_text())
        if not isinstance(facts, dict) or path.name != f"step-{facts.get('step', -1):08d}":
            raise ValueError(f"facts.json is of another step: {facts}")
        with _one_process():
            dcp.load(state, checkpoint_id=path, no_dist=True)
    except (Exception, CheckpointException) as error:  # whatever a damaged file makes of torch, json or the disk
        warn(f"checkpoint {path} is damaged ({_reason(error)}); trying the one before it")
        return None
    return facts, state["balance"], state["random"]


def _refuse(folder: Path, num: int) -> None:
    raise EquipoiseError(
        f"A run can go on from a whole checkpoint only: all {num} in {folder} are damaged. Restore one, or "
        "remove the run's folder and train again."
    )


def save_model(
    folder: Path, model: nn.Module, balance: Balance, tokenizer_file: Path, ranks: Ranks = ALONE
) -> str | None:
    """Saves the trained model for plain Transformers; returns what a user must know about its biases, if anything.

    A family with a bias slot carries its biases in the slot. Of the others the biases lie beside the weights and
    ``config.json`` names them: plain Transformers routes without; ``equipoise.attach(model, "frozen", biases=folder)``
    routes with them.
    """
    weights = state_to_save(model)
    return ranks.first(_save_model, folder, model, weights, balance, tokenizer_file)


def _save_model(
    folder: Path, model: nn.Module, weights: dict[str, Any] | None, balance: Balance, tokenizer_file: Path
) -> str | None:
    from safetensors import SafetensorError

    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        note = _write_model(aside, folder, model, weights, balance, tokenizer_file)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise EquipoiseError(
            f"The trained model must be written whole: {folder}: {_reason(error)}. Make room on the disk and go on "
            "with --resume, or leave the model out with --no-save-model too."
        ) from None
    return note


def _write_model(
    aside: Path,
    folder: Path,
    model: nn.Module,
    weights: dict[str, Any] | None,
    balance: Balance,
    tokenizer_file: Path,
) -> str | None:
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(aside, state_dict=weights)
    end = end_of_text(tokenizer_file)
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token=end).save_pretrained(aside)
    if balance.save_biases(aside) is None:
        return None
    multiplies = read_biases(aside)[1]
    what, strategy = "factors on its scores" if multiplies else "biases", frozen_strategy(multiplies)
    return (
        f"{model.config.model_type} has no slot for {what}: plain Transformers routes {folder} without them; "
        f'equipoise.attach(model, "{strategy}", biases="{folder}") routes with them.'
    )
