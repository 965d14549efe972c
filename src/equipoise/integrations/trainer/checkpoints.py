"""The state of the balancing in the Trainer's checkpoints, and the weights that the Trainer does not load."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from equipoise.alerts import Alerts
from equipoise.balance import Balance
from equipoise.errors import EquipoiseError

__all__ = ["STATE_FILE", "load_missing_weights", "load_state", "save_state"]

STATE_FILE = "equipoise_balance.pt"  # in every checkpoint: Balance.state_dict(), and Alerts.state_dict() as "alerts"
_log = logging.getLogger("equipoise")


def save_state(folder: Path, balance: Balance, alerts: Alerts) -> None:
    """Writes both states into ``folder``, as ``STATE_FILE``."""
    torch.save(balance.state_dict() | {"alerts": alerts.state_dict()}, folder / STATE_FILE)


def load_state(folder: Path, balance: Balance, alerts: Alerts, may_be_missing: bool = False) -> None:
    """Loads what ``save_state`` wrote into ``folder``; with ``may_be_missing`` nothing if no rank has the file.

    Collective over the group. Raises ``EquipoiseError`` on every rank if any rank lacks the file or cannot read it.
    """
    path, state, error = folder / STATE_FILE, None, None
    try:
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
        elif not may_be_missing:
            raise EquipoiseError(
                f"a checkpoint must hold {STATE_FILE}: {folder} does not. It was saved without this callback, or on "
                "another node. Copy the file to every node (save_on_each_node=True writes it there), or begin with "
                "the biases that the model holds: EquipoiseCallback(..., fresh=True)."
            )
    except Exception as caught:
        error = caught
    has_state = balance.agree("loading a checkpoint", state is not None, error)
    if all(has_state):
        assert state is not None
        alerts_state = state.pop("alerts", None)  # checkpoints of earlier versions have none
        balance.load_state_dict(state)
        if alerts_state is not None:
            alerts.load_state_dict(alerts_state)
    elif any(has_state):
        raise EquipoiseError(
            f"every rank must have {path}: rank {has_state.index(False)} of the group does not. Copy the file there."
        )


def load_missing_weights(model: Any, folder: Path) -> None:
    """Loads the experts, which the Trainer does not load from a checkpoint (transformers #48805, open).

    ``save_pretrained`` writes experts one by one. The Trainer looks for them under the names that the model uses.
    """
    files = [*folder.glob("model*.safetensors")]
    is_loaded_by_engine = any(folder.glob("global_step*"))  # of DeepSpeed, which loads all weights by itself
    if not files or is_loaded_by_engine or not isinstance(model, PreTrainedModel):
        return
    saved_names: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            saved_names |= {*weights.keys()}
    tied_names = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    missing = model.state_dict().keys() - saved_names - tied_names
    if missing:
        loaded = type(model).from_pretrained(folder).state_dict()
        model.load_state_dict({name: loaded[name] for name in missing}, strict=False)
        _log.warning(
            f"EquipoiseCallback: the Trainer did not load {len(missing)} weights of {folder} (transformers #48805), "
            f"such as {min(missing)}. They are loaded now."
        )
