"""Command line arguments -> options of one command. Imports no torch."""

import contextlib
import functools
import io
import operator
import os
import re
import shutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cli import audit, compare, conformance, export_check, families, recipes, report, reproduce, train
from equipoise_lab.cli.lists import join_lists
from equipoise_lab.cli.mistakes import check_command, sentence

__all__ = ["parse", "run"]

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
    ),
    "audit": ("equipoise audit runs/one --data my_text --out runs/audit",),
    "families": ("equipoise families qwen", "equipoise families --wide", "equipoise families runs/one"),
    "recipes": ("equipoise recipes deepseek-v3",),
    "reproduce": ("equipoise reproduce --budget 0", "equipoise reproduce 1-scope --budget 30"),
    "conformance": ("equipoise conformance", "equipoise conformance transformers"),
}


def parse(arguments: list[str]) -> Any:
    """The options of the command that ``arguments`` name: an instance of one class of ``COMMANDS``.

    Raises ``UsageError`` with one sentence where they do not fit, and ``SystemExit`` after ``--help``.
    """
    check_command(arguments, NAMES)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _one_column():
            return _parse(join_lists(arguments))
    except SystemExit as stop:
        if stop.code in (0, None):
            command = arguments[0] if arguments[0] in NAMES else ""
            if lines := EXAMPLES.get(command):
                print("\n".join(["examples:", *(f"  {line}" for line in lines)]))
            raise
        raise UsageError(sentence(errors.getvalue(), arguments, lambda: _flags(arguments[0]))) from None


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


def _parse(arguments: list[str]) -> Any:
    try:
        import tyro
    except ImportError:
        raise EquipoiseError(
            "the command line needs the lab, and tyro is not installed. Install it with: pip install 'equipoise[lab]'"
        ) from None
    return tyro.cli(
        functools.reduce(operator.or_, [command.subcommand() for command in COMMANDS.values()]),
        prog="equipoise",
        args=arguments,
        description=(
            "Load balancing for mixture-of-experts training: train small models on real text under any "
            "strategy and see what balancing did to balance, quality and specialisation."
        ),
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _flags(command: str) -> list[str]:
    """The options of a command, as its help names them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        _parse([command, "--help"])
    return re.findall(r"^. (?:-h, )?(--[\w-]+)", re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()), re.MULTILINE)


def run(options: Any, command_line: str) -> None:
    """Runs the command of these options. ``command_line`` goes into the record of a run or an audit."""
    COMMANDS[type(options)].run(options, command_line)
