"""Command line arguments -> options of one command. Imports no torch."""

import contextlib
import functools
import io
import operator
import re
from types import ModuleType
from typing import Any

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cli import audit, compare, conformance, export_check, families, recipes, report, reproduce, train

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


def parse(arguments: list[str]) -> Any:
    """The options of the command that ``arguments`` name: an instance of one class of ``COMMANDS``.

    Raises ``UsageError`` with one sentence where they do not fit, and ``SystemExit`` after ``--help``.
    """
    try:
        import tyro
    except ImportError:
        raise EquipoiseError(
            "the command line needs the lab, and tyro is not installed. Install it with: pip install 'equipoise[lab]'"
        ) from None
    subcommands = functools.reduce(operator.or_, [command.subcommand() for command in COMMANDS.values()])
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                subcommands,
                prog="equipoise",
                args=arguments,
                description=(
                    "Load balancing for mixture-of-experts training: train small models on real text under any "
                    "strategy and see what balancing did to balance, quality and specialisation."
                ),
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(errors.getvalue())) from None


def run(options: Any, command_line: str) -> None:
    """Runs the command of these options. ``command_line`` goes into the record of a run or an audit."""
    COMMANDS[type(options)].run(options, command_line)


def _one_line(text: str) -> str:
    """The text in a box that tyro draws, as one line."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    words = " ".join(line for line in lines if not line.startswith("╭"))  # the first line only repeats the title
    return re.sub(r"[\s╰╯│─]+", " ", words).strip()
