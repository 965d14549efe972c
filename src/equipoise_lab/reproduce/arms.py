"""What the arms of claims take from frontiers: coefficients, rates and learning rates. Imports no torch.

frontier = "NAME"                        all options that the frontier NAME runs with (strategy, score function), at
                                         the coefficient or rate that was chosen there, and at the learning rate if
                                         it tries several; options beside it are added, or stand in place of these
strategy = "lbl:coefficient={NAME}"      only the coefficient or rate
strategy = "loss-free:rate={NAME/4}"     a quarter of it; any whole number may stand there, and * in place of /
learning_rate = "{NAME.learning_rate}"   only the learning rate; it may be divided, too
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Choice", "Need", "fill", "needs"]

_PLACEHOLDER = re.compile(r"\{([\w-]+)(\.learning_rate)?(?:([*/])([1-9]\d*))?\}")


@dataclass(frozen=True)
class Choice:
    """What was chosen on a frontier."""

    value: str  # the coefficient or rate; "" for a mechanism without a number
    options: Mapping[str, Any]  # of ``equipoise train``, with the value and the chosen learning rate


@dataclass(frozen=True)
class Need:
    """That an arm takes something from a frontier."""

    frontier: str
    what: str  # all, value, learning rate


def needs(arm: Mapping[str, Any]) -> Iterator[Need]:
    """What the arm still takes from frontiers."""
    if "frontier" in arm:
        yield Need(arm["frontier"], "all")
    for option in arm.values():
        for name, learning_rate, *_ in _PLACEHOLDER.findall(str(option)):
            yield Need(name, "learning rate" if learning_rate else "value")


def fill(arm: Mapping[str, Any], chosen: Mapping[str, Choice | None]) -> dict[str, Any]:
    """The arm with what was chosen; what has no choice yet (None) stays as it is."""
    filled = {name: _filled(option, chosen) for name, option in arm.items()}
    choice = chosen.get(arm.get("frontier", ""))
    if choice is None:
        return filled
    del filled["frontier"]
    return {**choice.options, **filled}


def _filled(option: Any, chosen: Mapping[str, Choice | None]) -> Any:
    if not isinstance(option, str):
        return option

    def chosen_number(placeholder: re.Match[str]) -> str:
        name, learning_rate, operation, number = placeholder.groups()
        choice = chosen.get(name)
        if choice is None:
            return placeholder[0]
        value = f"{choice.options['learning_rate']:g}" if learning_rate else choice.value
        if operation is None:
            return value
        return f"{float(value) * int(number) if operation == '*' else float(value) / int(number):g}"

    text = _PLACEHOLDER.sub(chosen_number, option)
    alone = _PLACEHOLDER.fullmatch(option)
    return float(text) if alone and alone[2] and text != option else text  # a learning rate is a number, not a text
