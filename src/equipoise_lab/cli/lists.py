"""Options that take several values, written in several places of a command line. Imports no torch."""

import dataclasses
from collections.abc import Sequence

from equipoise_lab.train.config import Compare, Train

__all__ = ["join_lists"]

LISTS = {
    f"--{field.name}"
    for options in (Compare, Train)
    for field in dataclasses.fields(options)
    if "tuple" in str(field.type)
}


def join_lists(arguments: Sequence[str]) -> list[str]:
    """Moves all values of such an option to its first place. Tyro would take those of the last place only.

    >>> join_lists(["train", "--tracker", "tensorboard", "--steps", "9", "--tracker=trackio"])
    ['train', '--tracker', 'tensorboard', 'trackio', '--steps', '9']
    """
    joined: list[str] = []
    values: dict[str, list[str]] = {}  # by option
    option, is_open = "", False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in LISTS:
            option, is_open = name, True
            if option not in values:
                values[option] = []
                joined.append(option)
            if equals:
                values[option].append(value)
        elif is_open and not argument.startswith("--"):
            values[option].append(argument)
        else:
            is_open = False
            joined.append(argument)
    return [part for argument in joined for part in (argument, *values.get(argument, ()))]
