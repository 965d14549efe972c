"""Errors of equipoise where it meets the outside: an unknown model, a damaged file, a wrong option.

    Exception
    └── EquipoiseError      something outside is not as it must be (exit code 1 on the command line)
        └── UsageError      what was asked for cannot be asked for (exit code 2)

Every message says what must hold, what came, and what to do. Wrong arguments of plain functions raise ``ValueError``
or ``TypeError``, as usual in Python.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["EquipoiseError", "UsageError", "suggest"]


class EquipoiseError(Exception):
    """Something outside equipoise is not as it must be; the message says what to do."""


class UsageError(EquipoiseError, ValueError):
    """An option, a strategy or a name that does not exist or has a value it cannot have."""


def suggest(name: str, names: Iterable[str]) -> str:
    """A question that ends an error message, " Did you mean quantile?"; empty where no name is close.

    >>> suggest("quantil", ["quantile", "frozen"])
    ' Did you mean quantile?'
    """
    close = get_close_matches(name.lower(), list(names), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
