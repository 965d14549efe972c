"""Writes the tables of docs/reference/strategies.md: ``python docs/tools/strategies_page.py``.

Names, options and defaults come from the signatures of the classes. What is allowed is tried: a number that the class
accepts is allowed.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from generated import REFERENCE, main, table

from equipoise.balancers import Balancer
from equipoise.balancers.strategy import BALANCERS
from equipoise_lab.train.balancers import LAB_BALANCERS

PAGE = REFERENCE / "strategies.md"
ORDER = ("loss-free", "quantile", "lbl", "z", "frozen")
BESIDE: dict[tuple[str, str], dict[str, Any]] = {  # what an option must stand beside, to be tried
    ("loss-free", "zero_from"): {"schedule": "drop"},
    ("loss-free", "momentum"): {"rule": "momentum"},
    ("loss-free", "sharpness"): {"rule": "momentum"},
}
SMALL = 1e-12
RANGES = {  # what a class says to -1, 0, SMALL, 1 - SMALL, 1, 2
    (False, False, True, True, True, True): "above 0",
    (False, True, True, True, True, True): "0 or more",
    (False, True, True, True, False, False): "0 to below 1",
    (False, False, True, True, True, False): "above 0 to 1",
}


def markdown() -> dict[str, str]:
    """The generated parts of the page, by the name of their marker."""
    assert set(ORDER) == set(BALANCERS)
    return {
        "strategies": _table([BALANCERS[name] for name in ORDER], is_public=True),
        "lab strategies": _table(sorted(LAB_BALANCERS, key=lambda balancer: balancer.name), is_public=False),
    }


def _table(balancers: Sequence[type[Balancer]], is_public: bool) -> str:
    rows = []
    for balancer in balancers:
        name = balancer.__name__
        link = f"[{name}][equipoise.{name}]" if is_public else name
        for index, option in enumerate(inspect.signature(balancer).parameters.values()):
            names = (f"`{balancer.name}`", link) if index == 0 else ("", "")
            default = "not set" if option.default is None else f"`{_as_written(option.default)}`"
            rows.append((*names, f"`{option.name}`", default, _allowed(balancer, option.name)))
    return table(("string", "class", "option", "default", "allowed"), rows)


def _as_written(value: object) -> str:
    """A value as it is written in a strategy string."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(balancer: type[Balancer], name: str) -> str:
    kind = get_type_hints(balancer.__init__)[name]
    kinds = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    if get_origin(kinds[0]) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kinds[0]))
    if kinds[0] is bool:
        return "`true`, `false`"

    def is_allowed(value: float) -> bool:
        try:
            balancer(**BESIDE.get((balancer.name, name), {}), **{name: value})
        except ValueError:
            return False
        return True

    return _whole_numbers(is_allowed) if kinds[0] is int else _numbers(is_allowed)


def _numbers(is_allowed: Callable[[float], bool]) -> str:
    return RANGES[tuple(map(is_allowed, (-1, 0, SMALL, 1 - SMALL, 1, 2)))]


def _whole_numbers(is_allowed: Callable[[float], bool]) -> str:
    small = [number for number in range(1000) if is_allowed(number)]
    if small == list(range(small[0], 1000)):
        return f"a whole number from {small[0]}"
    powers = [2**exponent for exponent in range(40) if is_allowed(2**exponent)]
    assert small == [0, *(power for power in powers if power < 1000)], "say here what is allowed"
    return f"0, or a power of two from {powers[0]:,} to {powers[-1]:,}"


if __name__ == "__main__":
    main(PAGE, markdown())
