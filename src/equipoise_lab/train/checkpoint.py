"""Saves checkpoints that survive a kill at any moment, and the trained model for plain Transformers.

    step-N/state.safetensors   every tensor of the state by its path; all else, as JSON in the metadata
    step-N/facts.json          the step, and the blake2b of the state

Rank 0 writes and reads the full state. So a run can be resumed with any number of ranks and any wrapper. Neither file
can run code when it is read: a run folder may come from somebody else. ``torch.distributed.checkpoint`` is not used
for files, because it unpickles its ``.metadata``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from equipoise.balance import Balance
from equipoise.errors import EquipoiseError
from equipoise.saved import frozen_strategy, read_biases
from equipoise_lab.records import read_json, write_json
from equipoise_lab.train.data import end_of_text
from equipoise_lab.train.ranks import ONE_PROCESS, Ranks
from equipoise_lab.train.wrappers import state_to_save

__all__ = ["CHECKPOINTS", "load_newest", "newest_step", "save", "save_model"]

NUM_KEPT = 2  # the newest, and the one before it in case the newest is damaged
CHECKPOINTS = "checkpoints"  # the folder of them, in the folder of a run
STATE, FACTS = "state.safetensors", "facts.json"
FORMER_FORMAT = ".metadata"  # a pickle, which torch.distributed.checkpoint wrote


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


def _map_leaves(state: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """``state`` with every value that is not a dict, list or tuple replaced by ``function(path, value)``."""
    if isinstance(state, dict):
        return {key: _map_leaves(value, function, f"{path}/{key}") for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_map_leaves(value, function, f"{path}/{i}") for i, value in enumerate(state))
    return function(path, state)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _reason(error: Exception) -> str:
    """One line."""
    reason = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {reason[0][:300]}"


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
    from safetensors import SafetensorError

    target, temporary = _path(folder, step), folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_state(temporary / STATE, state)
        write_json(temporary / FACTS, {"step": step, "blake2b": _digest(temporary / STATE)})
        for file in temporary.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EquipoiseError(
            f"A checkpoint must be written completely: {target}: {_reason(error)}. The earlier checkpoints are "
            "complete. Make room on the disk and continue with --resume."
        ) from None
    for old in sorted(folder.glob("step-*"))[:-NUM_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _write_state(path: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    memory: set[int] = set()  # safetensors refuses tensors that share it, as tied weights do

    def collect(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            place = value.untyped_storage().data_ptr()
            tensors[path] = (value.clone() if place in memory else value).contiguous()
            memory.add(place)
        else:
            values[path] = value

    _map_leaves(state, collect)
    save_file(tensors, path, metadata={"values": json.dumps(values)})


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
    steps, reasons = ranks.run_on_first(_find_steps, folder), list[str]()
    for step in steps:
        balance = balance_of(step)
        state = _state(model, optimizer, balance)
        loaded = ranks.run_on_first(_read, _path(folder, step), state, warn)
        if isinstance(loaded, str):
            reasons.append(loaded)
            continue
        facts, balance_state, random = loaded
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.size > 1)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        balance.load_state_dict(balance_state)
        torch.set_rng_state(random)
        ranks.run_on_first(_put_aside, folder, steps[: steps.index(step)])
        return facts
    if steps:
        ranks.run_on_first(_refuse, folder, reasons)
    return None


def _put_aside(folder: Path, damaged: list[int]) -> None:
    """Renames checkpoints that could not be read. Else they would count as the newest two, and good ones would go."""
    for step in damaged:
        path = _path(folder, step)
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _find_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in the folder, newest first."""
    numbers = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in the folder; 0 without one. It is not read, so it may be damaged."""
    return max(_find_steps(folder), default=0)


def _read(path: Path, state: dict[str, Any], warn: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor] | str:
    """Fills ``state`` from a checkpoint. Returns its facts, Balance state and random state; why not if it cannot."""
    try:
        facts = read_json(path / FACTS)
        if not isinstance(facts, dict) or path.name != f"step-{facts.get('step', -1):08d}":
            raise ValueError(f"{FACTS} belongs to another step: {facts}")
        if not (path / STATE).exists() and (path / FORMER_FORMAT).exists():
            raise ValueError(f"{FORMER_FORMAT} is a pickle, which can run code: former versions wrote such checkpoints")
        if _digest(path / STATE) != facts.get("blake2b"):
            raise ValueError(f"{STATE} is not the one that {FACTS} names")
        state.update(_read_state(path / STATE, state))
        torch.Generator().set_state(state["random"])  # raises for what is not a generator's state
    except Exception as error:  # safetensors, torch, json and the disk fail in many ways on a damaged file
        reason = f"checkpoint {path} cannot be read ({_reason(error)})"
        warn(f"{reason}; trying the previous one")
        return reason
    return facts, state["balance"], state["random"]


def _read_state(path: Path, template: dict[str, Any]) -> Any:
    """The state in a file. It must have the structure, shapes and types of ``template``, and nothing else."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        values = json.loads((file.metadata() or {})["values"])
        unread = {*file.keys(), *values}

        def stored(path: str, expected: Any) -> Any:
            if path not in unread:
                raise ValueError(f"it has no {path}")
            unread.remove(path)
            value = file.get_tensor(path) if isinstance(expected, Tensor) else values[path]
            if _kind(value) != _kind(expected):
                raise ValueError(f"{path} must be {_kind(expected)}: got {_kind(value)}")
            return value

        state = _map_leaves(template, stored)
    if unread:
        raise ValueError(f"the model has no {min(unread)}")
    return state


def _kind(value: Any) -> Any:
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _refuse(folder: Path, reasons: list[str]) -> None:
    raise EquipoiseError(
        f"A run can only be resumed from a complete checkpoint: all {len(reasons)} in {folder} are damaged, or of "
        f"another version: {reasons[0]}. Restore one, continue with the version of equipoise that wrote them, or "
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
