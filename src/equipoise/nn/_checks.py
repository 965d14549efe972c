"""Checks of constructor arguments."""

import math
from typing import Any

__all__ = ["check_positive", "check_sizes", "is_int"]


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        if not is_int(value) or value < 1:
            raise ValueError(f"{name} must be an integer, 1 or more: got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    if not (is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite positive number: got {value!r}.")
