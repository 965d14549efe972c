"""Writes the tables of invariants in docs/reference/testing.md: ``python docs/tools/testing_page.py``."""

import re
from collections.abc import Callable, Mapping

from generated import REFERENCE, main, table

from equipoise.testing import balancers, routers

PAGE = REFERENCE / "testing.md"


def markdown() -> dict[str, str]:
    """The generated parts of the page, by the name of their marker."""
    return {
        "invariants of balancers": _table(balancers._INVARIANTS),
        "invariants of routers": _table(routers._INVARIANTS),
    }


def _table(invariants: Mapping[str, Callable[..., None]]) -> str:
    return table(("name", "what must hold"), [(f"`{name}`", _sentence(check)) for name, check in invariants.items()])


def _sentence(check: Callable[..., None]) -> str:
    """The first sentence of its docstring."""
    words = " ".join((check.__doc__ or "").split())
    return re.split(r"(?<=[.]) (?=[A-Z`])", words)[0].replace("``", "`")


if __name__ == "__main__":
    main(PAGE, markdown())
