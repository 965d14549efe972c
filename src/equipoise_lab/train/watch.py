"""Shows the progress of runs on stderr: a live line on a terminal, otherwise a plain line now and then."""

import copy
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from equipoise_lab.analysis.reader import read_runs
from equipoise_lab.analysis.summary import COLUMNS, summary_rows
from equipoise_lab.train.config import Train

__all__ = ["Runs", "Terminal", "Tokens", "print_rows", "print_table"]

GAP, INDENT = 2, 2  # spaces between the columns of a table; spaces before the cells below a first column
LINE_INTERVAL = 10.0  # seconds between lines if stderr is not a terminal


class Terminal:
    """Shows strategy, step, loss, maxvio, tokens per second and time left. Use it as a context manager.

    Runs may go one after another. Parallel runs each use a watcher from ``add_run()``.
    """

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
        self.is_parallel, self.prefix = False, ""  # prefix of messages

    def add_run(self) -> "Terminal":
        """A watcher for a parallel run, on the same screen. After its start, its messages name the run."""
        watcher = copy.copy(self)
        watcher.is_parallel = True
        return watcher

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
        figures = "already complete" if done == config.steps else "first step ..."
        self.task = self.progress.add_task(
            self.label.replace("[", "\\["), total=config.steps, completed=done, figures=figures
        )
        if done == config.steps:
            self.say(f"{self.label}: already complete")
        elif done:
            self.say(f"{self.label}: continuing after step {done}")
        if self.is_parallel:
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
        is_first, is_last = row["step"] == self.first + 1, row["step"] == self.num_steps
        if is_first or is_last or now - self.last_line >= LINE_INTERVAL:
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


def print_table(folder: Any, *, stderr: bool = False) -> None:
    """Prints one row per strategy, with the figures and formats of the page. Damaged runs are named on stderr."""
    runs, problems = read_runs(folder)
    summary = summary_rows(run.files for run in runs)
    rows = [(row["strategy"], *(column.text(row).replace("± ", "±") for column in COLUMNS)) for row in summary]
    has_deviations = any("±" in cell for row in rows for cell in row)
    print_rows(("strategy", *(column.short for column in COLUMNS)), rows, stderr=stderr, justify="right")
    notes = ["±: standard deviation over seeds"] if has_deviations else []
    for note in [*notes, *(f"{p.name}: {p.kind}: {p.reason}" for p in problems if p.kind == "damaged")]:
        Console(stderr=True, highlight=False).print(note, style="dim", markup=False, soft_wrap=True)


class _Bar:
    """A progress bar and messages. Use it as a context manager."""

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
    """Shows how many runs are done, and the time left."""

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

    def done(self, tokens: int, total: int) -> None:
        if self.console.is_terminal:
            self._update(tokens, total)
        elif time.monotonic() - self.last_line >= LINE_INTERVAL:
            self.last_line = time.monotonic()
            self.say(f"{tokens:,} of {total:,} tokens")


def print_rows(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    stderr: bool = True,
    justify: Literal["left", "right"] = "left",
) -> None:
    """Prints a table. The first column names the rows and is left-justified; ``justify`` applies to the others.

    Words are not broken. If a terminal is too narrow for the longest words, the name of a row gets a line of its own.
    """
    console, rows = Console(stderr=stderr, highlight=False, markup=False, emoji=False), [tuple(row) for row in rows]
    if not console.is_terminal:
        console.width = max(console.width, 160) if stderr else 10_000  # in a file, one line per row
    widths = _widths([titles, *rows], console.width, must=len(titles) < 2)
    stacked = widths is None
    if widths is None:
        titles, rows, above = titles[1:], [row[1:] for row in rows], [titles[0], *(row[0] for row in rows)]
        widths = _widths([titles, *rows], console.width - INDENT, must=True)
        assert widths is not None
        console.width = max(console.width, sum(widths) + GAP * len(widths))
    grid = [Table.grid(padding=(0, GAP, 0, 0)) for _ in range(1 + len(rows))]
    with console.capture() as shown:
        for number, row in enumerate((titles, *rows)):
            for column, width in enumerate(widths):
                side = "left" if column == 0 and not stacked else justify
                grid[number].add_column(width=width, justify=side, overflow="fold", style="" if number else "bold")
            grid[number].add_row(*row)
            if stacked:
                console.print(above[number], style="" if number else "bold")
            console.print(Padding(grid[number], (0, 0, 0, INDENT if stacked else 0)))
    print("\n".join(line.rstrip() for line in shown.get().splitlines()), file=sys.stderr if stderr else sys.stdout)


def _widths(rows: Sequence[Sequence[str]], room: int, must: bool = False) -> list[int] | None:
    """The widths of the columns in ``room`` characters.

    A column is as wide as its widest cell. If there is no room for that, it is as wide as its longest word, and the
    remaining room goes to the columns with the most text to fold. If not even the words fit, the result is None, or the
    widths of the words with ``must``.

    >>> _widths([["one", "two words"], ["a", "b"]], 14), _widths([["one", "two words"]], 11), _widths([["one", "b"]], 3)
    ([3, 9], [3, 6], None)
    """
    columns = list(zip(*rows, strict=True))
    whole = [max(map(cell_len, column)) for column in columns]
    widths = [max(cell_len(word) for cell in column for word in ("", *cell.split())) for column in columns]
    left = room - GAP * (len(widths) - 1) - sum(widths)
    if left < 0:
        return widths if must else None
    for _ in range(left if widths else 0):
        most = max(range(len(widths)), key=lambda i: whole[i] / max(widths[i], 1))
        if widths[most] >= whole[most]:
            break
        widths[most] += 1
    return widths
