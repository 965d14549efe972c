"""Errors that equipoise raises about its surroundings: an unknown model, a damaged file, a wrong option.

Every message says what must hold, what came, and what to do. Wrong arguments of plain functions raise ``ValueError``
or ``TypeError``, as usual in Python.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

__all__ = ["EquipoiseError", "UsageError", "check_choice", "suggest"]

Choice = TypeVar("Choice", bound=str)


class EquipoiseError(Exception):
    """An input or the environment is wrong; the message says what to do. Exit code 1 on the command line.

    Not of this kind: ``ConformanceError``, and the ``ValueError`` and ``TypeError`` of plain functions.
    """


class UsageError(EquipoiseError, ValueError):
    """An option, a strategy or a name that does not exist, or a value that is not allowed. Exit code 2.

    It is a ``ValueError`` too.
    """


def suggest(name: str, names: Iterable[str]) -> str:
    """The end of an error message, " Did you mean quantile?"; empty if no name is close.

    >>> suggest("quantil", ["quantile", "frozen"])
    ' Did you mean quantile?'
    """
    close = get_close_matches(name.lower(), list(names), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def check_choice(name: str, value: Any, choices: tuple[Choice, ...]) -> Choice:
    """``value``, which must be one of ``choices``; otherwise a ``ValueError`` that names them and the closest one."""
    if value not in choices:
        near = suggest(str(value), choices)
        raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}.{near}")
    return value
