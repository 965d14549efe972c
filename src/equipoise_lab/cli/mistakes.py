"""Wrong command lines -> one sentence: what must hold, what came, what to do. Imports no torch."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from equipoise.errors import UsageError, suggest

__all__ = ["check_command", "sentence"]


def check_command(arguments: Sequence[str], names: Sequence[str]) -> None:
    """Raises ``UsageError`` unless the first argument is a command or asks for help."""
    if not arguments:
        raise UsageError(
            f"the command must be one of {', '.join(names)}: got none. `equipoise --help` says what each does."
        )
    first = arguments[0]
    if first in names or first in ("-h", "--help"):
        return
    if first.startswith("-"):
        raise UsageError(f"the command, one of {', '.join(names)}, must come first: got {first}. Write it before that.")
    near = suggest(first, names) or " `equipoise --help` says what each does."
    raise UsageError(f"the command must be one of {', '.join(names)}: got {first!r}.{near}")


def sentence(text: str, arguments: Sequence[str], flags: Callable[[], list[str]]) -> str:
    """The error that tyro printed, as a sentence.

    Args:
        text: what tyro printed, in a box.
        arguments: of the command line. The first is a command.
        flags: gives the options of this command.
    """
    line, command = _one_line(text), f"equipoise {arguments[0]}"
    more = f"`{command} --help` says what it takes."
    if found := re.match(
        r"Unrecognized (?:or misplaced )?options: (.*?)(?: Perhaps| Available| For full help|$)", line
    ):
        return _unknown(found[1], arguments, flags(), command, more)
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)", line):
        value, name, listed = found.groups()
        choices = [choice for choice in re.findall(r"'([^']*)'", listed) if choice != "None"]
        return f"{name} must be one of {', '.join(choices)}: got {value!r}.{suggest(value, choices) or f' {more}'}"
    if found := re.match(r"Missing from .*?: (.*?)(?: \(required\)| For full help|$)", line):
        name, _, meaning = found[1].rstrip(".").partition(" ")
        if name.startswith("--"):
            kind, _, meaning = meaning.partition(" ")
            name = f"{name} {kind}"
        return f"`{command}` needs {name}: got none.{f' {meaning}.' if meaning else ''} {more}"
    if found := re.match(r"Missing value for argument '(\S+)'", line):
        return f"{found[1]} needs a value: got none. Write one after it; {more}"
    if found := re.match(r"Error parsing (\S+?): (.*?)(?: Argument helptext:| For full help|$)", line):
        return _bad_value(found[1], found[2], more)
    return line


def _unknown(tokens: str, arguments: Sequence[str], flags: list[str], command: str, more: str) -> str:
    names = [one.partition("=")[0].replace("_", "-") for one in arguments if one.startswith("--")]
    for name in names:
        if name not in flags and name != "--help":
            bare = name.removeprefix("--no-") if name.startswith("--no-") else name.removeprefix("--")
            near = get_close_matches(bare, [flag.removeprefix("--") for flag in flags], n=1)
            hint = f"Did you mean --{near[0]}?" if near else more
            return f"an option must be one of `{command}`: got {name}. {hint}"
    short = [one for one in arguments if re.match(r"-[A-Za-z]", one) and one != "-h"]
    if short:
        return f"an option must be one of `{command}`, which have two dashes: got {short[0]}. {more}"
    return f"`{command}` must get the arguments that it knows, and no more: got {tokens}. Leave that out; {more}"


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
