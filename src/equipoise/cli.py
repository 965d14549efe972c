"""The command line: ``equipoise compare | train | report``. Talk goes to stderr; stdout is for results.

Exit codes: 0 done; 1 something outside is not as it must be; 2 what was asked for cannot be; 130 stopped by the user.
"""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from equipoise.errors import EquipoiseError, UsageError
from equipoise.lab.config import Compare, Train

__all__ = ["main"]


@dataclass(frozen=True)
class Report:
    """Draw report.html again from the run folders alone."""

    folder: Path
    """The folder that was passed as --out to compare or train."""


def _parse(arguments: list[str]) -> Compare | Train | Report:
    import tyro

    commands = (
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Report, tyro.conf.subcommand("report"), tyro.conf.Positional]
    )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                commands,
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


def _one_line(text: str) -> str:
    """What tyro draws in a box, as a sentence."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    words = " ".join(line for line in lines if not line.startswith("╭"))  # the title says the same
    return re.sub(r"[\s╰╯│─]+", " ", words).strip()


def _run(asked: Compare | Train | Report, command: str) -> None:
    if isinstance(asked, Report):
        from equipoise.report import write_report

        print(write_report(asked.folder))
        return
    _share_the_cores()
    try:
        from equipoise.lab.watch import Terminal, print_table
    except ImportError as error:
        raise EquipoiseError(
            f"the lab needs more than torch: {error.name} is missing. Install it with: pip install 'equipoise[lab]'"
        ) from None
    asked.check()
    if isinstance(asked, Compare):
        with Terminal(num_runs=len(asked.runs())) as terminal:
            from equipoise.lab.compare import compare

            results, failure = compare(asked, terminal, command)
        if results:
            print_table(asked.out)
            print(f"{asked.out / 'report.html'}", file=sys.stderr)
        if asked.json:
            json.dump(results, sys.stdout, ensure_ascii=False, indent=1)
            print()
        if failure is not None:
            raise failure
        return
    with Terminal() as terminal:
        from equipoise.lab.train import train

        train(asked, terminal, command)
    print_table(asked.out)
    print(asked.out)


def _share_the_cores() -> None:
    """Threads of torch wait for each other thousands of times a step. By default they wait in a busy loop, and where
    anything else runs on the machine the one that is waited for does not get its core: a step takes many times as long.
    So they sleep after a short while. It must be said before torch is loaded; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command ``equipoise``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: say how to go on
    try:
        _run(_parse(arguments), shlex.join(["equipoise", *arguments]))
    except UsageError as error:
        _fail(str(error), 2)
    except EquipoiseError as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"files must be there to read and write: {error}. Mend that; --resume goes on with what was begun.", 1)
    except KeyboardInterrupt:
        print("equipoise: stopped. Go on with the same command and --resume.", file=sys.stderr)
        sys.exit(130)


def _fail(message: str, code: int) -> None:
    print(f"equipoise: error: {message}", file=sys.stderr)
    sys.exit(code)
