"""Writes the tables of docs/recipes.md: ``python docs/tools/recipes_page.py``."""

from collections.abc import Sequence
from pathlib import Path

from equipoise.errors import UsageError
from equipoise.recipes import FRAMEWORKS, RECIPES, WITHHELD, Recipe


def markdown() -> dict[str, str]:
    """The generated parts of docs/recipes.md, by the name of their marker."""
    return {
        "recipes": _table(
            ("name", "score function", "strategy", "summary"),
            [
                (f"[`{r.name}`](#{_anchor(r.name)})", r.score_function, f"`{r.strategy}`", r.summary)
                for r in RECIPES.values()
            ],
        ),
        "sources": "\n\n".join(_section(recipe) for recipe in RECIPES.values()),
        "withheld": _table(("name", "what is missing"), [(f"`{name}`", why) for name, why in WITHHELD.items()]),
        "frameworks": _table(
            ("name", "its coefficient", "value at balance", "layers", "factor", "what the factor leaves out", "source"),
            [
                (f"`{f.name}`", f.option, f.balanced, f.layers, f.formula, f.inexact, f.source)
                for f in FRAMEWORKS.values()
            ],
        ),
    }


def _section(recipe: Recipe) -> str:
    rows = [(f"`{key}`", value, source) for key, value, source in recipe.values()]
    notes = "".join(f"\n- {note}" for note in recipe.notes)
    text = f"### {recipe.name}\n\n{recipe.summary}\n\n```\n{recipe.strategy}\n```\n\n"
    return text + _table(("setting", "value", "source"), rows) + (f"\n{notes}" if notes else "")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _anchor(title: str) -> str:
    return title.replace(".", "")


def update_page(text: str) -> str:
    """The text of docs/recipes.md with the parts between its markers generated again."""
    for name, part in markdown().items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise UsageError(f"The page must hold {start} and {end} once each. Put the markers back.")
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{part}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "recipes.md"
    page.write_text(update_page(page.read_text(encoding="utf-8")), encoding="utf-8")
