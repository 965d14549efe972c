"""Strategy strings of the lab, checked before torch is imported: names, options, and values that are a choice.

Numbers, and options that must go together, are checked by the balancers themselves.
"""

from collections.abc import Iterable, Mapping

from equipoise.errors import UsageError, check_choice
from equipoise.recipes import RECIPES
from equipoise.recipes.strings import read_strategy

__all__ = ["OPTIONS", "check_strategies", "is_name"]

Choices = tuple[str, ...]  # empty: a number, or true or false

OPTIONS: Mapping[str, Mapping[str, Choices]] = {
    "frozen": {"multiplies": ()},
    "loss-free": {
        "rate": (),
        "rule": ("sign", "proportional", "rms", "multiplicative", "momentum"),
        "center": (),
        "scope": ("micro_batch", "global_batch"),
        "schedule": ("constant", "linear", "drop"),
        "zero_from": (),
        "momentum": (),
        "sharpness": (),
    },
    "quantile": {"bins": (), "ema": (), "fraction": ()},
    "lbl": {
        "coefficient": (),
        "scope": ("sequence", "micro_batch", "global_batch"),
        "pooling": ("window", "previous"),
        "normalise": (),
    },
    "z": {"coefficient": ()},
    "shuffle": {"coefficient": ()},
    "phi": {"coefficient": (), "memory": ()},
    "shinka": {"coefficient": ()},
    "lbl-unbiased": {"coefficient": ()},
    "lbl-groups": {"coefficient": (), "groups": ()},
    "lbl-contrast": {"coefficient": (), "within": ()},
}
"""By the name of a mechanism its options, in the order of the signature, and the values that an option may have."""


def is_name(name: str) -> bool:
    """Whether ``name`` is a mechanism, a recipe or none."""
    return name == "none" or name in OPTIONS or name in RECIPES


def check_strategies(strategies: Iterable[str]) -> None:
    """Raises ``UsageError`` for the first strategy with an unknown name, option or choice."""
    for strategy in strategies:
        text, mechanisms = read_strategy(strategy, OPTIONS)
        for name, arguments in mechanisms:
            for option, value in arguments.items():
                if not (choices := OPTIONS[name][option]):
                    continue
                try:
                    check_choice(option, value, choices)
                except ValueError as error:
                    raise UsageError(f"in {text!r}, {error}") from None
