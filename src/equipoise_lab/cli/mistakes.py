"""Wrong command lines -> one sentence: what must hold, what came, what to do. Imports no torch."""

import os
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise

from equipoise.errors import UsageError, suggest

__all__ = ["check_command", "sentence"]


def check_command(arguments: Sequence[str], names: Sequence[str]) -> None:
    """Raises ``UsageError`` unless the first argument is a command or asks for help, and the others can be values."""
    listed = f"one of {', '.join(names)}"
    if not arguments:
        raise UsageError(f"the command must be {listed}: got none. `equipoise --help` says what each does.")
    first = arguments[0]
    if first in ("help", "version", "-V", "-v"):
        asked = "--version" if first != "help" else f"{arguments[1]} --help" if arguments[1:2] else "--help"
        raise UsageError(f"the command must be {listed}: got {first}. Did you mean `equipoise {asked}`?")
    if first in names or first in ("-h", "--help"):
        _check_empty(arguments)
        _check_utf_8(arguments)
        return
    if near := get_close_matches(first.lower(), [*names, "--help", "--version"], n=1):
        raise UsageError(
            f"the command must be one that `equipoise --help` lists: got {first!r}. Did you mean {near[0]}?"
        )
    if first.startswith("-"):
        raise UsageError(f"the command, {listed}, must come first: got {first}. Write it before that.")
    raise UsageError(f"the command must be {listed}: got {first!r}. `equipoise --help` says what each does.")


def _check_empty(arguments: Sequence[str]) -> None:
    """An empty value is mostly a variable of the shell that is not set; as a path it would be the current folder."""
    for before, one in pairwise(arguments):
        name = one.partition("=")[0] if one.startswith("--") else before if before.startswith("--") else "an argument"
        if one == "" or (one.startswith("--") and one.endswith("=") and one.count("=") == 1):
            raise UsageError(f"{name} must have a value: got an empty one. Write one, or leave it out.")


def _check_utf_8(arguments: Sequence[str]) -> None:
    """Names of files may be any bytes, but records, pages and terminals take text."""
    for one in arguments:
        shown = os.fsencode(one).decode(errors="replace")
        if shown.encode() != os.fsencode(one):
            raise UsageError(f"an argument must be UTF-8: got {shown!r}. Rename the file or folder.")


def sentence(text: str, arguments: Sequence[str], flags: Callable[[], list[str]]) -> str:
    """The error that tyro printed, as a sentence.

    Args:
        text: what tyro printed, in a box.
        arguments: of the command line. The first is a command.
        flags: gives the options of this command.
    """
    line, command = _one_line(text), f"equipoise {arguments[0]}"
    more = f"`{command} --help` says what it takes."
    if unknown := _unknown_option(arguments, flags(), command, more):
        return unknown
    if match := re.match(
        r"Unrecognized (?:or misplaced )?options: (.*?)(?: Perhaps| Available| For full help|$)", line
    ):
        return f"`{command}` must get the arguments that it knows, and no more: got {match[1]}. Leave that out; {more}"
    if match := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)", line):
        value, name, listed = match.groups()
        choices = [choice for choice in re.findall(r"'([^']*)'", listed) if choice != "None"]
        return f"{name} must be one of {', '.join(choices)}: got {value!r}.{suggest(value, choices) or f' {more}'}"
    if match := re.match(r"Missing from .*?: (.*?)(?: \(required\)| For full help|$)", line):
        return _missing(match[1].rstrip("."), arguments, command, more)
    if match := re.match(r"Missing value for argument '(\S+)'", line):
        return f"{match[1]} needs a value: got none. Write one after it; {more}"
    if match := re.match(r"Error parsing (\S+?): (.*?)(?: Argument helptext:| For full help|$)", line):
        return _bad_value(match[1], match[2], more)
    return line


def _missing(missing: str, arguments: Sequence[str], command: str, more: str) -> str:
    """``missing``: the option or argument and its meaning, as the help has them."""
    name, _, meaning = missing.partition(" ")
    if name.startswith("--"):
        kind, _, meaning = meaning.partition(" ")
        if len(arguments) > 1 and not arguments[1].startswith("-"):
            return f"`{command}` needs {name} {kind}: got {arguments[1]} alone. Write {name} {arguments[1]}."
        name = f"{name} {kind}"
    meaning = re.split(r"(?<=[a-z])\. ", meaning)[0]
    return f"`{command}` needs {name}: got none.{f' {meaning}.' if meaning else ''} {more}"


def _unknown_option(arguments: Sequence[str], flags: list[str], command: str, more: str) -> str:
    """The error of the first option that the command does not have; "" if it has all of them."""
    names = [one.partition("=")[0].replace("_", "-") for one in arguments if one.startswith("--")]
    for name in names:
        if name not in flags and name != "--help":
            bare = name.removeprefix("--no-") if name.startswith("--no-") else name.removeprefix("--")
            near = get_close_matches(bare, [flag.removeprefix("--") for flag in flags], n=1)
            hint = f"Did you mean --{near[0]}?" if near else more
            return f"an option must be one of `{command}`: got {name}. {hint}"
    for one in arguments:
        if re.match(r"-[A-Za-z]", one) and one != "-h":
            near = [flag for flag in flags if flag.startswith(f"--{one[1:]}")]
            hint = f"Did you mean {near[0]}?" if len(near) == 1 else more
            return f"an option must be one of `{command}`, which have two dashes: got {one}. {hint}"
    return ""


def _bad_value(name: str, reason: str, more: str) -> str:
    kinds = {"int": "a whole number", "float": "a number", "could not convert string to float": "a number"}
    value = re.search(r"'([^']*)'[^']*$", reason)
    kind = next((words for part, words in kinds.items() if part in reason), None)
    if kind is None or value is None:
        return f"{name} must have a value that it can take: {reason.rstrip('.')}. {more}"
    return f"{name} must be {kind}: got {value[1]!r}."


def _one_line(text: str) -> str:
    """The text in a box that tyro draws, as one line. Where the terminal has no lines, it is drawn with ``+-|``."""
    _, *lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()  # the first line only repeats the title
    words = [line.strip(" │|") for line in lines if re.search(r"\w", line)]
    return re.sub(r"\s+", " ", " ".join(words)).strip()
