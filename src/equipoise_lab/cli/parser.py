"""Command line arguments -> options of one command. Imports no torch."""

import contextlib
import functools
import io
import operator
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TextIO

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cli import audit, compare, conformance, export_check, families, recipes, report, reproduce, train
from equipoise_lab.cli.config_file import ConfigFile, config_path, read_config_file
from equipoise_lab.cli.lists import join_lists
from equipoise_lab.cli.mistakes import check_command, sentence
from equipoise_lab.cli.process import requires_lab

__all__ = ["config_file", "parse", "run"]

COMMANDS: dict[type, ModuleType] = {  # by the class of their options, in the order of --help
    compare.Compare: compare,
    train.Train: train,
    report.Report: report,
    recipes.Recipes: recipes,
    reproduce.Reproduce: reproduce,
    audit.Audit: audit,
    export_check.ExportCheck: export_check,
    families.Families: families,
    conformance.Conformance: conformance,
}

NAMES = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS.values()]

WITH_CONFIG_FILE = (train, compare)

HELP_WIDTH = 120  # characters at most

EXAMPLES: dict[str, tuple[str, ...]] = {  # by command, below its help; "": below that of equipoise
    "": (
        "equipoise compare --out runs/first",
        "equipoise compare --help",
    ),
    "compare": (
        "equipoise compare --out runs/first",
        "equipoise compare --out runs/mine --data my_text --strategies none lbl:scope=global_batch loss-free:rate=1e-2",
        "equipoise compare --out runs/paired --steps 200 --seeds 3",
    ),
    "train": (
        "equipoise train --out runs/one --strategy quantile",
        "equipoise train --out runs/watched --tracker tensorboard",
        "equipoise train --out runs/tuned --strategy lbl:scope=global_batch,coefficient=1e-2 --model runs/one",
        "equipoise train --out runs/again --config runs/one/run.yaml",
    ),
    "audit": ("equipoise audit runs/one --data my_text --out runs/audit",),
    "families": ("equipoise families qwen", "equipoise families --wide", "equipoise families runs/one"),
    "recipes": ("equipoise recipes deepseek-v3",),
    "reproduce": ("equipoise reproduce --budget 0", "equipoise reproduce 1-scope --budget 30"),
    "conformance": ("equipoise conformance", "equipoise conformance transformers"),
}


def parse(arguments: list[str], file: ConfigFile | None = None) -> Any:
    """The options of the command that ``arguments`` name: an instance of one class of ``COMMANDS``.

    ``file`` is what ``--config`` names, if it has been read. Raises ``UsageError`` with one sentence where the
    arguments do not fit, and ``SystemExit`` after ``--help``.
    """
    check_command(arguments, NAMES)
    file = config_file(arguments) if file is None else file
    errors = io.StringIO()
    try:
        paragraphs: Any = _Paragraphs(sys.stdout)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(paragraphs), _one_column():
            return _parse(join_lists(arguments), file)
    except SystemExit as stop:
        if stop.code in (0, None):
            command = arguments[0] if arguments[0] in NAMES else ""
            if lines := EXAMPLES.get(command):
                print("\n".join(["examples:", *(f"  {line}" for line in lines)]))
            raise
        raise UsageError(sentence(errors.getvalue(), arguments, lambda: _flags(arguments[0], file))) from None


class _Paragraphs:
    """Writes to ``stream``, and breaks the lines of a help that tyro does not break: those outside of its boxes."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        text = text.replace(f"{{{','.join(NAMES)}}}", "COMMAND ...")
        return self._stream.write("\n".join(map(self._broken, text.split("\n"))))

    def _broken(self, line: str) -> str:
        width = shutil.get_terminal_size().columns
        if len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= width:
            return line
        return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _one_column() -> Iterator[None]:
    """From 130 characters on, tyro puts the boxes of a help side by side, which loses their order."""
    before = os.environ.get("COLUMNS")
    if sys.stdout.isatty():
        os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, HELP_WIDTH))
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif sys.stdout.isatty():
            os.environ.pop("COLUMNS", None)


def _parse(arguments: list[str], file: ConfigFile | None) -> Any:
    try:
        import tyro
    except ImportError:
        raise EquipoiseError(
            "the command line needs the lab, and tyro is not installed. In a clone: pip install -e '.[lab]'"
        ) from None
    return tyro.cli(
        functools.reduce(operator.or_, _subcommands(arguments[0], file)),
        prog="equipoise",
        args=arguments,
        description=(
            "Load balancing for mixture-of-experts training: train small models on real text under any "
            "strategy and see what balancing did to balance, quality and specialisation."
        ),
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _subcommands(name: str, file: ConfigFile | None) -> Iterator[Any]:
    """What tyro needs of every command. The options of ``file`` become defaults of the command ``name``."""
    for command in COMMANDS.values():
        if command not in WITH_CONFIG_FILE:
            yield command.subcommand()
        else:
            yield command.subcommand(file.values if file is not None and command.__name__.endswith(f".{name}") else {})


def config_file(arguments: list[str]) -> ConfigFile | None:
    """The file that ``--config`` names; None without it. Raises ``UsageError`` if it does not hold options."""
    path = config_path(arguments)
    if path is None:
        return None
    with requires_lab(arguments[0]):
        return read_config_file(path, arguments[0])


def _flags(command: str, file: ConfigFile | None) -> list[str]:
    """The options of a command, as its help names them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        _parse([command, "--help"], file)
    return re.findall(r"^. (?:-h, )?(--[\w-]+)", re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()), re.MULTILINE)


def run(options: Any, command_line: str) -> None:
    """Runs the command of these options. ``command_line`` goes into the record of a run or an audit."""
    COMMANDS[type(options)].run(options, command_line)
