"""The colour, dash and symbol of a strategy, the same on every page."""

import math
import re
from collections.abc import Iterable, Sequence

from equipoise.recipes.published import RECIPES, split_strategy

__all__ = ["strategy_styles"]

# The colours of Okabe and Ito, chosen for colour-blind readers, without their yellow, which is pale on white.
BLUE, SKY, GREEN, ORANGE, VERMILLION, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
GREY, BROWN, VIOLET = "#808080", "#8C6D31", "#7B5EA7"
LOSS_COLORS = {"sequence": ORANGE, "micro_batch": VERMILLION, "global_batch": BLUE}  # by scope
OTHER = BROWN  # mechanisms without a colour of their own
HUES = (BLUE, SKY, GREEN, ORANGE, VERMILLION, PINK, VIOLET, BROWN, GREY)

SHADES = (0.0, -0.35, 0.25)  # towards black, or towards white
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
NUMBER = re.compile(r"=((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)")


def strategy_styles(strategies: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour, dash and symbol for each strategy, in order of first appearance. ``none`` is grey.

    The colour depends on the name alone, so it is the same on every page: its hue is that of the mechanism, and of the
    scope of a loss; its shade is that of the first number, so rates that differ by a factor of 3 or 10 differ. Only
    where a page has two strategies of one colour, the later one takes the next. Dashes and symbols tell apart the
    strategies of one hue.

    >>> strategy_styles(["none", "lbl:scope=global_batch,coefficient=1e-2"])["none"]
    {'color': '#808080', 'dash': 'solid', 'symbol': 'x'}
    """
    styles: dict[str, dict[str, str]] = {}
    used: list[tuple[str, int]] = []  # hues and levels
    for strategy in dict.fromkeys(strategies):
        if strategy == "none":
            styles[strategy] = {"color": GREY, "dash": "solid", "symbol": "x"}
            continue
        hue, level = _free(_hue(strategy), _level(strategy), used)
        place = sum(other == hue for other, _ in used) % len(SYMBOLS)
        used.append((hue, level))
        styles[strategy] = {"color": _shaded(hue, SHADES[level]), "dash": DASHES[place], "symbol": SYMBOLS[place]}
    return styles


def _free(hue: str, level: int, used: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """The first free level of the hue, else of the next hue. If none is free, the first of all."""
    start = HUES.index(hue)
    for other in HUES[start:] + HUES[:start]:
        for further in range(len(SHADES)):
            if (other, (level + further) % len(SHADES)) not in used:
                return other, (level + further) % len(SHADES)
    return hue, level


def _hue(strategy: str) -> str:
    """The colour of the mechanisms. ``strategy`` may be a recipe, and may have a suffix such as ", selection hash"."""
    strategy = strategy.split(", ")[0]
    if strategy in RECIPES:
        strategy = RECIPES[strategy].strategy
    parts = split_strategy(strategy)
    names = {part.split(":")[0] for part in parts}
    if "lbl" in names and names & {"quantile", "loss-free", "frozen"}:
        return VIOLET if "quantile" in names else SKY
    if "quantile" in names:
        return PINK
    if "loss-free" in names:
        return GREEN
    if "lbl" in names:
        options = next(part for part in parts if part.startswith("lbl"))
        scope = re.search(r"scope=(\w+)", options)
        return LOSS_COLORS.get(scope.group(1) if scope else "global_batch", OTHER)
    return OTHER


def _level(strategy: str) -> int:
    """Two levels per factor of ten of the first number, modulo the shades; 0 without a number."""
    number = NUMBER.search(strategy)
    value = 0.0 if number is None else float(number.group(1))
    return round(2 * math.log10(value)) % len(SHADES) if 0 < value < math.inf else 0


def _shaded(color: str, towards: float) -> str:
    """The colour mixed with white, or with black if ``towards`` is negative."""
    target = 255 if towards > 0 else 0
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + abs(towards) * (target - c)):02X}" for c in channels)
