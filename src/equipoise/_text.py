"""Short texts for messages. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["abbreviate"]


def abbreviate(values: Iterable[Any]) -> str:
    """The first three values and how many there are; of a mapping also what each key is mapped to.

    >>> abbreviate(["a", "b", "c", "d"])
    'a, b, c ... (4 in all)'
    >>> abbreviate({"blocks.0.gate": 8})
    'blocks.0.gate [8]'
    >>> abbreviate([])
    'none'
    """
    if isinstance(values, Mapping):
        texts = [f"{key} [{value}]" for key, value in values.items()]
    else:
        texts = [str(value) for value in values]
    return ", ".join(texts[:3]) + (f" ... ({len(texts)} in all)" if len(texts) > 3 else "") if texts else "none"
