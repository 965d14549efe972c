"""Does the runs that are missing. Imports no torch.

A run is a process of `equipoise train` with one thread; as many run side by side as there are cores. For small models
this is faster than one run at a time on all cores.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from equipoise.errors import EquipoiseError
from equipoise_lab.records import Run
from equipoise_lab.reproduce.jobs import Job
from equipoise_lab.reproduce.made_with import THREADS, remember
from equipoise_lab.reproduce.results import Results, diverged_at

__all__ = ["Progress", "execute"]

OVERHEAD = 15.0  # seconds of a run outside its steps (start, evaluations); a guess until one is measured


class Progress(Protocol):
    """Shows how the runs progress."""

    def say(self, text: str) -> None: ...

    def done(self, number: int, total: int, seconds_left: float | None) -> None: ...


def _kind(job: Job) -> Any:
    """What decides how long a run takes: its steps and its precision."""
    options = dict(job.options)
    return options.get("steps"), options.get("dtype")


def _expected_seconds(job: Job, seconds_by_kind: Mapping[Any, list[float]]) -> float | None:
    """The median time of runs of the same kind; None before the first one."""
    known = seconds_by_kind.get(_kind(job))
    return statistics.median(known) if known else None


def execute(
    jobs: Sequence[Job],
    results: Results,
    work: Path,
    progress: Progress,
    *,
    workers: int,
    minutes: float | None = None,
    start: Callable[..., Any] = subprocess.Popen,
) -> bool:
    """Does the missing runs, in their order. Returns whether all of them are stored now.

    ``work`` holds the folders of runs in progress. A run continues from its last checkpoint, and its folder is removed
    once its result is stored. With ``minutes``, a run starts only if it should end within them. Ctrl-C stops the runs
    and keeps their checkpoints. A run that diverges gets a result that says so. A run that fails raises
    ``EquipoiseError`` with its folder, and no further run starts.
    """
    todo, total = results.missing(jobs), len(list(dict.fromkeys(jobs)))
    began, lock = time.monotonic(), threading.Lock()
    seconds_by_kind: dict[Any, list[float]] = {}  # of the steps of a run, done here or stored before
    overheads: list[float] = []  # seconds outside the steps, of runs done here
    for job in dict.fromkeys(jobs):
        if (stored := results.get(job)) is not None:
            seconds_by_kind.setdefault(_kind(results.in_precision(job)), []).append(stored["seconds"])
    failures: list[Exception] = []
    running: dict[Any, tuple[Job, float]] = {}  # by process: the job and when it started
    stopped = threading.Event()

    def expected(job: Job) -> float | None:
        seconds = _expected_seconds(results.in_precision(job), seconds_by_kind)
        return None if seconds is None else seconds + (statistics.median(overheads) if overheads else OVERHEAD)

    def seconds_left() -> float | None:
        """Until the last run ends, if each starts as soon as a worker is free."""
        now, busy = time.monotonic(), [0.0] * workers  # seconds that each worker still needs
        elapsed_and_expected = [(now - start_time, expected(job)) for job, start_time in list(running.values())]
        for elapsed, seconds in elapsed_and_expected + [(0.0, expected(job)) for job in todo]:
            if seconds is None:
                return None
            busy.sort()
            busy[0] += max(0.0, seconds - elapsed)
        return max(busy)

    def next_job() -> Job | None:
        with lock:
            while todo and results.get(todo[0]) is not None:  # another process has done it meanwhile
                todo.pop(0)
            if not todo or failures or stopped.is_set():
                return None
            if minutes is not None and time.monotonic() - began + (expected(todo[0]) or 0.0) > 60 * minutes:
                return None
            return results.in_precision(todo.pop(0))

    def worker() -> None:
        try:
            do_jobs()
        except Exception as error:  # an exception of a thread does not reach the main thread by itself
            failures.append(error)

    def do_jobs() -> None:
        while (job := next_job()) is not None:
            name = results.name(job)
            folder, log_file, made_with_file = work / name, work / f"{name}.log", work / f"{name}.made_with.json"
            command = [sys.executable, "-m", "equipoise", "train", "--out", str(folder), "--no-save-model", "--resume"]
            environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
            is_new, start_time = not folder.exists(), time.monotonic()
            made_with = remember(made_with_file, folder)
            with open(log_file, "wb") as log:
                process = start([*command, *job.arguments], stdout=log, stderr=log, env=environment)
                running[process] = job, start_time
                code = process.wait()
                del running[process]
            if stopped.is_set():
                return
            with lock:
                if code != 0 and not ((folder / "config.json").exists() and diverged_at(Run(folder)) is not None):
                    log_text = log_file.read_text(errors="replace")
                    last_line = (log_text.strip().splitlines() or ["nothing"])[-1]
                    failures.append(
                        EquipoiseError(
                            f"every run must succeed: `equipoise train {' '.join(job.arguments)}` exited with {code}. "
                            f"Its last line was: {last_line}. Its folder is {folder}. Fix that and run the same "
                            "command again; finished runs are kept."
                        )
                    )
                    return
                seconds = results.put(job, Run(folder), made_with)
                shutil.rmtree(folder, ignore_errors=True)
                log_file.unlink(missing_ok=True)
                made_with_file.unlink(missing_ok=True)
                seconds_by_kind.setdefault(_kind(job), []).append(seconds)
                if is_new:
                    overheads.append(max(0.0, time.monotonic() - start_time - seconds))
                progress.done(total - len(results.missing(jobs)), total, seconds_left())

    work.mkdir(parents=True, exist_ok=True)
    progress.done(total - len(todo), total, seconds_left())
    threads = [threading.Thread(target=worker) for _ in range(max(1, min(workers, len(todo))))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)
    except KeyboardInterrupt:
        stopped.set()
        for process in list(running):
            process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    return not results.missing(jobs)
