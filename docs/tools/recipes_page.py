"""Writes the tables of docs/reference/recipes.md and recipe_sources.md: ``python docs/tools/recipes_page.py``."""

from generated import REFERENCE, main, table

from equipoise.recipes import FRAMEWORKS, RECIPES, WITHHELD, Recipe, split_strategy

PAGE = REFERENCE / "recipes.md"
SOURCES_PAGE = REFERENCE / "recipe_sources.md"


def markdown() -> dict[str, str]:
    """The generated parts of recipes.md, by the name of their marker."""
    return {
        "recipes": table(
            ("name", "score function", "strategy", "summary"),
            [(_link(r.name), r.score_function, _broken(r.strategy), r.summary) for r in RECIPES.values()],
        ),
        "withheld": table(("name", "what is missing"), [(f"`{name}`", why) for name, why in WITHHELD.items()]),
        "frameworks": table(
            ("name", "its coefficient", "value at balance", "layers", "factor"),
            [(f"`{f.name}`", f.option, f.balanced, f.layers, f.formula) for f in FRAMEWORKS.values()],
        ),
        "framework sources": table(
            ("name", "what the factor leaves out", "source"),
            [(f"`{f.name}`", f.inexact or "nothing", f.source) for f in FRAMEWORKS.values()],
        ),
    }


def sources() -> dict[str, str]:
    """The generated part of recipe_sources.md."""
    return {"sources": "\n\n".join(_section(recipe) for recipe in RECIPES.values())}


def _section(recipe: Recipe) -> str:
    rows = [(f"`{key}`", value, source) for key, value, source in recipe.values()]
    notes = "".join(f"\n- {note}" for note in recipe.notes)
    text = f"## {recipe.name}\n\n```text\n{recipe.strategy}\n```\n\n"
    return text + table(("setting", "value", "source"), rows) + (f"\n{notes}" if notes else "")


def _broken(strategy: str) -> str:
    """A strategy string with each mechanism on a line of its own."""
    return "<br>+ ".join(f"`{mechanism}`" for mechanism in split_strategy(strategy))


def _link(name: str) -> str:
    return f"[`{name}`]({SOURCES_PAGE.name}#{name.replace('.', '')})"


PAGES = {PAGE: markdown, SOURCES_PAGE: sources}

if __name__ == "__main__":
    for page, parts in PAGES.items():
        main(page, parts())
