"""Short texts for messages. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any


def abbreviate(values: Iterable[Any]) -> str:
    """The first three values and the number of all. A mapping is written as ``key [value]``.

    >>> abbreviate(["a", "b", "c", "d"])
    'a, b, c ... (4 in all)'
    >>> abbreviate({"blocks.0.gate": 8})
    'blocks.0.gate [8]'
    >>> abbreviate([])
    'none'
    """
    if isinstance(values, Mapping):
        values = [f"{key} [{value}]" for key, value in values.items()]
    texts = [str(value) for value in values]
    return ", ".join(texts[:3]) + (f" ... ({len(texts)} in all)" if len(texts) > 3 else "") if texts else "none"


def shape_or_type(value: Any) -> str:
    """The shape of a tensor; of anything else the name of its type.

    >>> shape_or_type([1, 2])
    'list'
    """
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)}"
