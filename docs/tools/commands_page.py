"""Writes the commands into docs/reference/commands.md: ``python docs/tools/commands_page.py``.

It reads what ``equipoise COMMAND --help`` prints, so the page has the groups, types and defaults of the help.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple
from unittest import mock

from generated import REFERENCE, main, table

from equipoise_lab.cli.parser import EXAMPLES, parse
from equipoise_lab.train.option_groups import GROUPS

PAGE = REFERENCE / "commands.md"
WRAPPED = 80  # a line of a help text of at least so many characters that ends within a sentence goes on in the next


class Option(NamedTuple):
    """An option, or an argument without a name, as the help shows it."""

    call: str  # "--out PATH"
    lines: list[str]  # of the help text


class Help(NamedTuple):
    """What ``--help`` prints of a command."""

    usage: str
    summary: str
    groups: dict[str, list[Option]]  # by title


def markdown() -> dict[str, str]:
    """The generated part of the page, by the name of its marker."""
    return {"commands": "\n\n".join(_section(name) for name in _commands())}


def _commands() -> list[str]:
    return re.findall(r"^│ +• ([\w-]+) ", _printed(), re.MULTILINE)


def _section(name: str) -> str:
    shown = _read(_printed(name))
    parts = [f"## equipoise {name}", _text(shown.summary.splitlines(), "\n"), f"```text\n{shown.usage}\n```"]
    if examples := EXAMPLES.get(name):
        parts.append("\n".join(["```text", *examples, "```"]))
    groups = {title: [o for o in options if not o.call.startswith("-h,")] for title, options in shown.groups.items()}
    for title, options in groups.items():
        if options and title not in ("options", "positional arguments"):
            parts.append(f"**{title[0].upper()}{title[1:]}**")
        if options:
            head = "argument" if title == "positional arguments" else "option"
            parts.append(table((head, "meaning"), [_row(option) for option in options]))
    return "\n\n".join(parts)


def _row(option: Option) -> tuple[str, str]:
    name, _, kind = option.call.partition(" ")
    *before, last = option.lines
    found = re.fullmatch(r"(.*?) ?\((?:(required)|default: (.*))\)", last)
    text, is_required, default = found.groups() if found else (last, None, None)
    words = []
    if kind.startswith("{"):
        words.append(f"One of {', '.join(f'`{choice}`' for choice in kind.strip('{}').split(','))}.")
        kind = ""
    if is_required:
        words.append("Required.")
    elif default not in (None, "None") and option.call != name:  # a flag is off by default
        words.append(f"Default: `{default}`.")
    lines = [_text([*before, text], "<br>"), " ".join(words)]
    return f"`{name}`{' ' if kind else ''}{kind}", "<br>".join(filter(None, lines))


def _text(lines: list[str], line_break: str) -> str:
    """A help text in Markdown: names of options as code, the lines of a list kept, others joined."""
    text = lines[0]
    for before, line in pairwise(lines):
        is_wrapped = len(before) >= WRAPPED and not before.endswith((".", ":"))
        text += (" " if is_wrapped else line_break) + line
    parts = re.split(r"(`[^`]*`|<br>)", text)
    return "".join(part if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _escaped(text: str) -> str:
    return re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"`\1`", re.sub(r"([\[\]*<>])", r"\\\1", text))


def _printed(*command: str) -> str:
    """What ``equipoise COMMAND --help`` prints, without breaks that the width of a terminal makes."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # an encoding that has the lines of a box
    wide = mock.patch.dict(os.environ, COLUMNS="1000", NO_COLOR="1")
    with wide, contextlib.redirect_stdout(stdout), contextlib.suppress(SystemExit):
        parse([*command, "--help"])
    stdout.seek(0)
    return stdout.read()


def _read(text: str) -> Help:
    text = _in_one_column(text)
    before, *boxes = re.split(r"^╭─ ", text, flags=re.MULTILINE)
    usage, _, summary = before.strip().partition("\n")
    groups = {re.split(" ─|─", box)[0].strip(): list(_options(box)) for box in boxes}
    return Help(re.sub(r"^usage: ", "", usage), summary.strip(), groups)


def _in_one_column(text: str) -> str:
    """The boxes one below the other, in the order of ``GROUPS``. Tyro puts them side by side where there is room."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("╭"))
    cuts = [0, *(edge.start() + 1 for edge in re.finditer("╮╭", lines[first])), None]
    columns = ["\n".join(line[start:end].rstrip() for line in lines[first:]) for start, end in pairwise(cuts)]
    boxes = [box for column in columns for box in re.findall(r"^╭.*?╯$", column, re.MULTILINE | re.DOTALL)]
    titles = [f"{group} options" for group in GROUPS]
    places = {box: titles.index(title) if (title := box[3:].split(" ─")[0]) in titles else -1 for box in boxes}
    return "\n".join([*lines[:first], *sorted(boxes, key=places.__getitem__)])


def _options(box: str) -> Iterator[Option]:
    option = None
    for line in re.findall(r"^│ (.*?) *│$", box, re.MULTILINE):
        if not line.startswith(" "):
            if option is not None:
                yield option
            call, *rest = re.split(r" {2,}", line, maxsplit=1)
            option = Option(call, rest)
        elif option is not None:
            option.lines.append(line.strip())
    if option is not None:
        yield option


if __name__ == "__main__":
    main(PAGE, markdown())
