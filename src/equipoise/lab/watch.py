"""What a person sees while runs go on: a live line on a terminal, a plain line now and then elsewhere. To stderr."""

import copy
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from equipoise.analysis.summary import COLUMNS, summary_rows
from equipoise.lab.config import Train
from equipoise.records import find_runs

__all__ = ["Runs", "Terminal", "Tokens", "print_rows", "print_table"]

SILENCE = 10.0  # seconds between lines where there is no terminal to redraw


class Terminal:
    """Shows strategy, step, loss, maxvio, tokens a second and time left: of runs one after another, or side by side,
    each told to ``another()``. Use it as a context manager."""

    def __init__(self, num_runs: int = 1):
        self.console = Console(stderr=True, highlight=False)
        self.num_runs, self.numbers = num_runs, itertools.count(1)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task: TaskID | None = None
        self.last_line = 0.0
        self.is_beside, self.prefix = False, ""  # of what is said

    def another(self) -> "Terminal":
        """For a run beside others, on the same screen: what it says once it has begun names it."""
        other = copy.copy(self)
        other.is_beside = True
        return other

    def __enter__(self) -> "Terminal":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(self.prefix + text, style="dim", markup=False, soft_wrap=True)

    def begin(self, config: Train, done: int) -> None:
        self.name = config.label + (f" seed {config.seed}" if config.seed else "")
        self.num_steps, self.started, self.first = config.steps, time.monotonic(), done
        count = f"[{next(self.numbers)}/{self.num_runs}] " if self.num_runs > 1 else ""
        self.label = count + self.name
        self.task = self.progress.add_task(
            self.label.replace("[", "\\["), total=config.steps, completed=done, figures="first step ..."
        )
        if done == config.steps:
            self.say(f"{self.label}: complete already")
        elif done:
            self.say(f"{self.label}: going on after step {done}")
        if self.is_beside:
            self.prefix = f"{self.label}: "

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None:
        figures = f"loss {row['loss']:.3f}  maxvio {row['maxvio_batch']:.2f}  {tokens_per_second:,.0f} tokens/s"
        if row.get("holding"):
            figures += f"  ! {row['holding']}"
        if self.console.is_terminal:
            assert self.task is not None
            self.progress.update(self.task, completed=row["step"], figures=figures)
            return
        now = time.monotonic()
        first, last = row["step"] == self.first + 1, row["step"] == self.num_steps
        if first or last or now - self.last_line >= SILENCE:
            self.last_line = now
            left = (now - self.started) / (row["step"] - self.first) * (self.num_steps - row["step"])
            self.console.print(
                f"{self.label}  step {row['step']}/{self.num_steps}  {figures}  {left:.0f} s left",
                markup=False,
                soft_wrap=True,
            )

    def end(self) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=self.num_steps)


def print_table(folder: Any) -> None:
    """One row a strategy, with the figures and formats of the report page. To stderr."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log has no width
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("strategy", overflow="fold")
    for column in COLUMNS:
        table.add_column(column.short, justify="right", min_width=max(map(len, column.short.split())))
    for row in summary_rows(find_runs(folder)):
        table.add_row(row["strategy"], *(column.text(row) for column in COLUMNS))
    console.print(table)


class _Bar:
    """One bar and lines of talk. Use it as a context manager."""

    def __init__(self, *columns: Any):
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(*columns, console=self.console)
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.task is not None and self.console.is_terminal:
            self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def _update(self, completed: int, total: int, left: str = "") -> None:
        if self.task is None:
            self.task = self.progress.add_task("", total=total, left=left)
            self.progress.start()
        self.progress.update(self.task, completed=completed, total=total, left=left)


class Runs(_Bar):
    """Shows how many runs are done and the time left."""

    def __init__(self) -> None:
        bar = BarColumn(bar_width=20)
        super().__init__(TextColumn("runs"), bar, MofNCompleteColumn(), TextColumn("{task.fields[left]}"))

    def done(self, number: int, total: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None or number == total else f"about {seconds_left / 60:.0f} minutes left"
        if self.console.is_terminal:
            self._update(number, total, left)
        else:
            self.say(f"{number} of {total} runs  {left}".rstrip())


class Tokens(_Bar):
    """Shows how many tokens are done."""

    def __init__(self) -> None:
        super().__init__(TextColumn("tokens"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        self.last_line = time.monotonic()

    def done(self, tokens: int, of: int) -> None:
        if self.console.is_terminal:
            self._update(tokens, of)
        elif time.monotonic() - self.last_line >= SILENCE:
            self.last_line = time.monotonic()
            self.say(f"{tokens:,} of {of:,} tokens")


def print_rows(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table, to stderr."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a log has no width
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
