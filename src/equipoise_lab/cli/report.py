"""``equipoise report``."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from equipoise.errors import UsageError
from equipoise_lab.cli.process import print_stderr

__all__ = ["Report", "run", "subcommand"]

EVERY = 10  # seconds between two live pages
LONGEST = 86_400  # the same, at most: a day. A browser that should wait for over 24 days does not wait at all


@dataclass(frozen=True)
class Report:
    folder: Path
    live: bool = False
    every: int = EVERY

    def check(self) -> None:
        """Raises UsageError for invalid values."""
        if not 1 <= self.every <= LONGEST:
            raise UsageError(f"--every must be from 1 to {LONGEST:,} seconds: got {self.every}.")
        if self.every != EVERY and not self.live:
            raise UsageError(f"--every needs --live: got {self.every}, and no --live. Add it, or leave --every out.")


def subcommand() -> Any:
    import tyro

    def report(
        folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help_behavior_hint="")],
        live: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
        every: int = EVERY,
    ) -> Report:
        """Draw report.html again, from run folders or from an audit.

        Args:
            folder: The folder that was passed as --out to compare, train or audit.
            live: Write the page again and again while the runs train, from their first step to their end.
            every: Seconds between two pages of --live.
        """
        return Report(folder, live, every)

    return Annotated[Report, tyro.conf.subcommand("report", constructor=report)]


def run(options: Report, command_line: str) -> None:
    options.check()
    from equipoise_lab.report import write_live, write_report

    write = partial(write_live, seconds=options.every) if options.live else write_report
    print(write(options.folder, say=print_stderr))
