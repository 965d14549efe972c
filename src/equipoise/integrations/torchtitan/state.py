"""What a checkpoint of torchtitan holds of the balancing."""

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.balance import Balance

__all__ = ["BalanceState"]

_BY_LAYER = ("biases", "load")


class BalanceState:
    """The state of all parts of a model as one, by layer: so a checkpoint may be loaded with other pipeline stages."""

    def __init__(self, balances: Sequence[Balance]):
        self.balances = balances

    def state_dict(self) -> dict[str, Any]:
        first, *others = [balance.state_dict() for balance in self.balances]
        for other in others:
            for name in _BY_LAYER:
                first[name] |= other[name]
            for name, values in other["state"].items():
                first["state"].setdefault(name, {}).update(values)
        return first

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for balance in self.balances:
            names = {layer.name for layer in balance.layers}

            def of_part(values: Mapping[str, Any], names: set[str] = names) -> dict[str, Any]:
                return {name: value for name, value in values.items() if name in names}

            part = {**state, **{name: of_part(state[name]) for name in _BY_LAYER}}
            part["state"] = {name: of_part(values) for name, values in state.get("state", {}).items()}
            balance.load_state_dict(
                {**part, "state": {name: values for name, values in part["state"].items() if values}}
            )
