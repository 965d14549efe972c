"""Shows the progress of runs on stderr: a live line on a terminal, otherwise a plain line now and then."""

import copy
import datetime
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from equipoise_lab.analysis.reader import read_runs
from equipoise_lab.analysis.summary import COLUMNS, summary_rows
from equipoise_lab.train.config import Train

__all__ = ["Runs", "Terminal", "Tokens", "print_rows", "print_table"]

GAP, INDENT = 2, 2  # spaces between the columns of a table; spaces before the cells below a first column
NARROW, MEDIUM, WIDE = 70, 100, 140  # columns of a terminal that has room for maxvio, for the speed, and for a bar
CTRL_C = 3  # columns: "^C", and the cursor behind it
LINE_INTERVAL = 10.0  # seconds between lines if stderr is not a terminal


class Terminal:
    """Shows step, time left, loss, strategy, maxvio and tokens per second. Use it as a context manager.

    Runs may go one after another. Parallel runs each use a watcher from ``add_run()``. Several runs have one line with
    the time left of all. A line never breaks: on a narrow terminal the strategy is cut, and what is less important
    than the loss is left out.
    """

    def __init__(self, num_runs: int = 1, console: Console | None = None):
        # The stream itself: a tracker that is slow has sys.stderr redirected, and this must be seen all the same.
        self.console = Console(file=sys.stderr, highlight=False) if console is None else console
        self.num_runs, self.numbers = num_runs, itertools.count(1)
        self.clock = _Clock(num_runs)
        self.progress = _Lines(
            _Cell(lambda task: task.fields["count"], "progress.download"),
            _Cell(self._time_left, "progress.remaining"),
            _Cell(lambda task: task.fields["loss"]),
            _Cell(lambda task: task.fields["label"], shrinks=True),
            _Cell(lambda task: self._from(NARROW, task.fields["maxvio"])),
            _Cell(lambda task: self._from(MEDIUM, task.fields["speed"])),
            _Cell(lambda task: self._from(MEDIUM, task.fields["mark"], task.fields["mark"][:1]), "bold", shrinks=True),
            console=self.console,
        )
        if self.console.width >= WIDE:
            self.progress.columns += (BarColumn(bar_width=12),)
        self.total = None if num_runs == 1 else self._add_task("", num_runs, f"0/{num_runs} runs", has_time_left=True)
        self.task: TaskID | None = None
        self.last_line = 0.0
        self.is_parallel, self.prefix = False, ""  # prefix of messages

    def _from(self, width: int, text: str, narrower: str = "") -> str:
        """``text`` if the terminal has this width, else ``narrower``."""
        return text if self.console.width >= width else narrower

    def _time_left(self, task: Task) -> str:
        if not task.fields["has_time_left"]:
            return ""
        seconds = self.clock.seconds_left()
        return "-:--:-- left" if seconds is None else f"{datetime.timedelta(seconds=round(seconds))} left"

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

    def _add_task(self, label: str, total: int, count: str, *, has_time_left: bool, done: int = 0) -> TaskID:
        texts: dict[str, Any] = {"loss": "", "mark": "", "maxvio": "", "speed": ""}  # the columns' fields
        return self.progress.add_task(
            "", total=total, completed=done, label=label, count=count, has_time_left=has_time_left, **texts
        )

    def say(self, text: str) -> None:
        self.console.print(self.prefix + text, style="dim", markup=False, soft_wrap=True)

    def begin(self, config: Train, done: int) -> None:
        self.name = config.label + (f" seed {config.seed}" if config.seed else "")
        self.num_steps, self.first, self.trained = config.steps, done, done
        self.clock.begin(config.steps, done)
        count = f"[{next(self.numbers)}/{self.num_runs}] " if self.num_runs > 1 else ""
        self.label = count + self.name
        self.task = self._add_task(
            self.label, config.steps, self._count(done), has_time_left=self.num_runs == 1, done=done
        )
        if done == config.steps:
            self.say(f"{self.label}: all {done} steps are trained")
        else:
            self.progress.update(self.task, loss="first step ...")
            if done:
                self.say(f"{self.label}: continuing after step {done}")
        if self.is_parallel:
            self.prefix = f"{self.label}: "

    def _count(self, step: int) -> str:
        return f"{step:{len(str(self.num_steps))}}/{self.num_steps}"

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None:
        assert self.task is not None
        self.trained = row["step"]
        self.clock.step()
        loss, maxvio = f"loss {row['loss']:.3f}", f"maxvio {row['maxvio_batch']:.2f}"
        speed, mark = f"{tokens_per_second:,.0f} tokens/s", f"! {row['holding']}" if row.get("holding") else ""
        self.progress.update(
            self.task,
            completed=row["step"],
            count=self._count(row["step"]),
            loss=loss,
            maxvio=maxvio,
            speed=speed,
            mark=mark,
        )
        if self.console.is_terminal:
            return
        now = time.monotonic()
        is_first, is_last = row["step"] == self.first + 1, row["step"] == self.num_steps
        if is_first or is_last or now - self.last_line >= LINE_INTERVAL:
            self.last_line = now
            seconds_left = self.clock.seconds_left() or 0.0
            left = f"{_duration(seconds_left)} left" + (" for all runs" if self.num_runs > 1 else "")
            figures = "  ".join(filter(None, (loss, maxvio, speed, mark)))
            self.console.print(
                f"{self.label}  step {row['step']}/{self.num_steps}  {left}  {figures}", markup=False, soft_wrap=True
            )

    def end(self) -> None:
        """The run is over, complete or not. One of several leaves the live lines, and a line above them remains."""
        if self.task is None:
            return
        self.clock.end(self.num_steps - self.trained)
        task = next(task for task in self.progress.tasks if task.id == self.task)
        self.progress.update(self.task, completed=self.num_steps, visible=self.num_runs == 1)
        self.task = None
        if self.total is None:
            return
        self.progress.advance(self.total)
        over = sum(1 for other in self.progress.tasks if other.id != self.total and not other.visible)
        self.progress.update(self.total, count=f"{over}/{self.num_runs} runs")
        if self.console.is_terminal and self.first < self.trained == self.num_steps:
            figures = "  ".join(task.fields[name] for name in ("count", "loss", "maxvio", "speed"))
            self.console.print(f"{figures}  {self.label}", markup=False, soft_wrap=True)


class _Lines(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        return [_Narrower(self.make_tasks_table(self.tasks))]


class _Narrower:
    """Leaves room for the ^C that a terminal shows at the cursor. It would begin a line, and the live lines move."""

    def __init__(self, content: RenderableType):
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        return console.render(self.content, options.update_width(options.max_width - CTRL_C))


class _Cell(ProgressColumn):
    """A cell of the live line. It never breaks. A cell that ``shrinks`` is cut where the line is too long."""

    def __init__(self, text: Callable[[Task], str], style: str = "", *, shrinks: bool = False):
        super().__init__(Column(no_wrap=not shrinks, overflow="ellipsis"))
        self.text, self.style = text, style

    def render(self, task: Task) -> Text:
        return Text(self.text(task), style=self.style, no_wrap=True, overflow="ellipsis")


class _Clock:
    """The time left of several runs with equally many steps: as if all further steps took as long as those so far."""

    def __init__(self, num_runs: int):
        self.num_runs = num_runs
        self.began: float | None = None
        self.num_steps, self.trained, self.over = 0, 0, 0  # steps: of a run; trained by us; trained, ever, or given up
        self.last_step: float | None = None

    def begin(self, num_steps: int, done: int) -> None:
        self.began = time.monotonic() if self.began is None else self.began
        self.num_steps = num_steps
        self.over += done

    def step(self) -> None:
        self.last_step = time.monotonic()
        self.trained += 1
        self.over += 1

    def end(self, remaining: int) -> None:
        self.over += remaining

    def seconds_left(self) -> float | None:
        """None before the first step."""
        if self.began is None or self.last_step is None:
            return None
        left = (self.last_step - self.began) / self.trained * (self.num_runs * self.num_steps - self.over)
        return max(0.0, left - (time.monotonic() - self.last_step))


def _duration(seconds: float) -> str:
    """In one number.

    >>> _duration(89), _duration(91), _duration(9000)
    ('89 s', '2 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_table(folder: Any, *, stderr: bool = False) -> None:
    """Prints one row per strategy, with the figures and formats of the page. Damaged runs are named on stderr."""
    runs, problems = read_runs(folder)
    summary = summary_rows(run.files for run in runs)
    rows = [(row["strategy"], *(column.text(row).replace("± ", "±") for column in COLUMNS)) for row in summary]
    has_deviations = any("±" in cell for row in rows for cell in row)
    print_rows(("Strategy", *(column.title for column in COLUMNS)), rows, stderr=stderr, justify="right")
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
