"""Published settings by name, with the source of every value. Imports no torch.

The data is in ``published.toml``. A recipe ships only if every value in it has a public source; see ``WITHHELD``.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from equipoise.errors import UsageError, suggest

__all__ = ["RECIPES", "WITHHELD", "Recipe", "recipe", "split_strategy"]


@dataclass(frozen=True)
class Recipe:
    """A published setting: a strategy string, and the source of each value in it.

    Attributes:
        name: the name by which ``attach`` and the command line know it.
        strategy: the strategy string.
        score_function: of the model that it was published for.
        summary: one sentence.
        sources: by setting, ``score_function`` or ``mechanism:option``, a paper (with equation, table or section) or an
            official config.
        notes: what the string cannot say.
    """

    name: str
    strategy: str
    score_function: str
    summary: str = field(repr=False)
    sources: Mapping[str, str] = field(repr=False)
    notes: Sequence[str] = field(default=(), repr=False)

    def values(self) -> list[tuple[str, str, str]]:
        """Every setting as ``(key, value, source)``, the score function first."""
        rows = [("score_function", self.score_function, self.sources["score_function"])]
        for part in split_strategy(self.strategy):
            mechanism, _, options = part.partition(":")
            for option in options.split(","):
                key, _, value = option.partition("=")
                rows.append((f"{mechanism}:{key}", value, self.sources[f"{mechanism}:{key}"]))
        return rows


def split_strategy(strategy: str) -> list[str]:
    """The mechanisms of a strategy string.

    Args:
        strategy: the string. A ``+`` before a digit belongs to a number.

    Examples:
        >>> split_strategy("loss-free:rate=1e+2+z:coefficient=1e-3")
        ['loss-free:rate=1e+2', 'z:coefficient=1e-3']
    """
    return re.split(r"\+(?=[A-Za-z])", strategy)


_DATA = tomllib.loads((files("equipoise.recipes") / "published.toml").read_text(encoding="utf-8"))

RECIPES: Mapping[str, Recipe] = {name: Recipe(name, **fields) for name, fields in _DATA["recipe"].items()}
"""The recipes by name."""

WITHHELD: Mapping[str, str] = _DATA["withheld"]
"""Published settings that are left out, by name: which value has no source."""


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Args:
        name: a key of ``RECIPES``.

    Raises:
        UsageError: an unknown name, with the names that are close; or one that is withheld, with the reason.

    Examples:
        >>> recipe("switch").strategy
        'lbl:coefficient=1e-2,scope=micro_batch'
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in WITHHELD:
        raise UsageError(f"A recipe must have a source for every value: {name} is left out. {WITHHELD[name]}")
    raise UsageError(
        f"A recipe must be one of the {len(RECIPES)} that `equipoise recipes` lists: got {name!r}."
        f"{suggest(name, RECIPES)}"
    )
