"""``equipoise report``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

__all__ = ["Report", "run", "subcommand"]


@dataclass(frozen=True)
class Report:
    """Draw report.html again, from run folders or from an audit."""

    folder: Path
    """The folder that was passed as --out to compare, train or audit."""


def subcommand() -> Any:
    import tyro

    return Annotated[Report, tyro.conf.subcommand("report"), tyro.conf.Positional]


def run(options: Report, command_line: str) -> None:
    from equipoise_lab.report import write_report

    print(write_report(options.folder))
