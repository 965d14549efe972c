"""The state of a ``Balance``: what a checkpoint holds, and how it is restored."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from equipoise._text import abbreviate
from equipoise.counting.pool import Pool, digest_of
from equipoise.counting.recorder import Recorder
from equipoise.errors import EquipoiseError

_log = logging.getLogger("equipoise")
_warned: WeakSet[Recorder] = WeakSet()  # whose state was taken in an open window, which is said once


def state_of(recorder: Recorder, strategy: str, multiplies: bool, device: torch.device) -> dict[str, Any]:
    """``Balance.state_dict``. Copies. Leaves out the open window, and leaves it as it is: begins no collective."""
    window = recorder.window
    if window.micro_batches and recorder not in _warned:
        _warned.add(recorder)
        _log.warning(
            f"state_dict: {len(window.micro_batches)} micro-batch(es) were counted since the last step() and are left "
            "out of the state. A training that resumes from it does not have them, nor their gradients. Save after "
            "step() to lose nothing."
        )
    vector = recorder.layout.zeros(device) if window.last is None else window.last.vector
    return {
        "strategy": strategy,
        "num_windows": window.num_closed,
        "biases": recorder.biases.by_name(),
        "multiplies": multiplies,
        "state": recorder.biases.state(),
        "load": {name: counts.clone() for name, counts in recorder.by_name(vector).items()},
    }


def load_state(
    state: Mapping[str, Any], recorder: Recorder, strategy: str, multiplies: bool, device: torch.device, pool: Pool
) -> None:
    """``Balance.load_state_dict``. Nothing moves if any rank's state cannot be restored."""
    error = None
    try:
        if recorder.window.micro_batches:
            raise EquipoiseError("load_state_dict() must be called between windows. Call step() first.")
        _check(state, recorder, strategy, multiplies)
    except Exception as caught:
        error = caught
    summary = None if error else (state["num_windows"], {key: digest_of(value) for key, value in state.items()})
    _check_equal_on_ranks(pool.agree("load_state_dict", summary, error))
    recorder.biases.load_state(state["biases"], state.get("state", {}))
    vector = None
    if state["num_windows"] and "load" in state:
        vector = recorder.layout.zeros(device)
        for name, load in recorder.by_name(vector).items():
            load.copy_(state["load"][name])
    recorder.window.restore(int(state["num_windows"]), vector)


def _check(state: Mapping[str, Any], recorder: Recorder, strategy: str, multiplies: bool) -> None:
    """Raises ``EquipoiseError`` if a state is of another model or strategy, or damaged."""
    layers, biases = recorder.layers, recorder.biases
    if not isinstance(state, Mapping) or not isinstance(state.get("biases", {}), Mapping):
        raise EquipoiseError(f"the state must be what state_dict() gave: got {type(state).__name__}.")
    expected = {layer.name: (layer.num_experts,) for layer in layers}
    parts = {key: state.get(key, {}) for key in ("biases", "load") if key in state or key == "biases"}
    windows = state.get("num_windows")
    if not isinstance(windows, int) or isinstance(windows, bool) or windows < 0:
        raise EquipoiseError(
            f"the state must hold num_windows, a whole number from 0: got {windows!r}. Load the state of a Balance."
        )
    moved = state.get("state", {})
    for key, part in {**parts, **(moved if isinstance(moved, Mapping) else {"state": moved})}.items():
        if not isinstance(part, Mapping) or not all(isinstance(value, Tensor) for value in part.values()):
            raise EquipoiseError(
                f"the state must hold tensors by layer name: its {key} are not. Load what state_dict() gave."
            )
        sizes = {name: tuple(value.shape) for name, value in part.items()}
        if sizes != expected:
            raise EquipoiseError(
                f"the state must be of a model with the same layers: its {key} have {abbreviate(sizes)}, this model "
                f"has {abbreviate(expected)}. Load the state that was saved with this model."
            )
        for name, value in part.items():
            _check_numbers(key, name, value)
    if multiplies != state.get("multiplies", False):
        raise EquipoiseError(
            "biases that are added and biases that multiply cannot take each other's place: the state is of "
            f"{state.get('strategy')}, this Balance has {strategy}. Attach the strategy of the state."
        )
    for index, layer in enumerate(layers):
        group, _ = biases.group_of[index]
        if group.steering is None and not torch.equal(state["biases"][layer.name].cpu(), biases.of(index).cpu()):
            raise EquipoiseError(
                f"biases must have a balancer that keeps them: the state of {state.get('strategy')} moves the choice "
                f"of {layer.name}, this Balance has {strategy}. Attach with frozen or loss-free too."
            )


def _check_numbers(key: str, layer: str, value: Tensor) -> None:
    is_load = key == "load"
    is_damaged = (value < 0).any() or value.dtype != torch.int64 if is_load else not value.isfinite().all()
    if is_damaged:
        raise EquipoiseError(
            f"the state must hold {'int64 counts' if is_load else 'finite numbers'}: its {key} of {layer} are not. The "
            "file is damaged, or training had diverged; load an earlier one."
        )


def _check_equal_on_ranks(summaries: Sequence[tuple[int, dict[str, str]]]) -> None:
    """Compares the number of windows of each rank's state, and a digest of each part."""
    for rank, summary in enumerate(summaries):
        if summary != summaries[0]:
            (first_windows, first), (windows, other) = summaries[0], summary
            parts = ", ".join(sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)))
            raise EquipoiseError(
                f"every rank must load the same state: rank 0 of the group has one after {first_windows} windows, rank "
                f"{rank} one after {windows}, and they differ in {parts}. Load the same checkpoint on all."
            )
