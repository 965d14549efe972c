"""Reads strategy strings: names and options, without the balancers they stand for. Imports no torch."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches

from equipoise.errors import UsageError, suggest
from equipoise.recipes.published import RECIPES, WITHHELD, recipe, split_strategy

__all__ = ["read_strategy"]


def read_strategy(text: str, options: Mapping[str, Collection[str]]) -> tuple[str, list[tuple[str, dict[str, object]]]]:
    """The strategy string (of a recipe: its own), and the name and arguments of each mechanism in it.

    Args:
        text: a strategy string, or the name of a recipe.
        options: the names of the options, by mechanism.

    Raises:
        UsageError: an unknown name or option.

    Examples:
        >>> read_strategy("lbl:scope=sequence", {"lbl": ["coefficient", "scope"]})
        ('lbl:scope=sequence', [('lbl', {'scope': 'sequence'})])
    """
    if text == "none":
        return text, []
    if not text:
        raise UsageError("A strategy must have a name: got an empty one. Use none for no balancing.")
    if re.search(r"\s\+|\+\s", text):
        raise UsageError(f"A strategy must have no blanks: got {text!r}. Write {''.join(text.split())!r}.")
    if text in RECIPES or text in WITHHELD:
        text = recipe(text).strategy
    return text, [_read_one(part, text, options) for part in split_strategy(text)]


def _read_one(text: str, whole: str, options: Mapping[str, Collection[str]]) -> tuple[str, dict[str, object]]:
    name, colon, written = text.partition(":")
    if name in RECIPES:
        raise UsageError(
            f"A recipe must stand alone: got {whole!r}. Copy its string, {RECIPES[name].strategy}, and change it; or "
            f"pass several strategies: attach(model, {name!r}, 'z')."
        )
    if name == "none":
        raise UsageError(f"The strategy none must stand alone: got {whole!r}. Leave it out.")
    if name not in options:
        where = repr(text) if text == whole else f"{text!r} in {whole!r}"
        without_colon = re.fullmatch(r"([\w-]+)[ ,;(]+(\w+=.*?)\)?", text)
        if without_colon and without_colon[1] in options:
            raise UsageError(
                f"Options of a strategy must follow a colon: got {where}. Did you mean "
                f"{without_colon[1]}:{without_colon[2]}?"
            )
        close = get_close_matches(name.lower().replace("_", "-"), [*options, *RECIPES], n=1)
        example = "Example: loss-free:rate=1e-3+lbl:scope=sequence,coefficient=1e-4"
        raise UsageError(
            f"A strategy must be none, or made of {', '.join(options)}, or a recipe (`equipoise recipes` lists them): "
            f"got {where}. {f'Did you mean {close[0]}?' if close else example}"
        )
    arguments: dict[str, object] = {}
    for option in written.split(",") if colon else []:
        key, equals, value = option.partition("=")
        if not equals or key not in options[name]:
            allowed = " or ".join(f"{known}=..." for known in options[name]) or "left out: it has none"
            raise UsageError(
                f"An option of {name} must be {allowed}: got {option!r} in {whole!r}.{suggest(key, options[name])}"
            )
        if key in arguments:
            raise UsageError(f"An option must be given once: got {key} twice in {whole!r}. Leave one out.")
        arguments[key] = _value(value)
    return name, arguments


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text
