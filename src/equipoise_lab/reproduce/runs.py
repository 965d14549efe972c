"""The runs that claims need: which are stored, which are missing, and how to do the missing ones. Imports no torch.

A run is a process of `equipoise train` with one thread; as many run side by side as there are cores. For small models
this is faster than one run at a time on all cores. The result of a run is one JSON file, named by a hash of its
options. So claims that need the same run share it, and a result counts wherever it was made.
"""

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from equipoise.errors import EquipoiseError
from equipoise_lab.records import Record, Run, read_json, require_keys, write_json
from equipoise_lab.reproduce.claim import Job

__all__ = ["Progress", "Results", "execute", "key_of"]

TEXTS = ("strategy", "alerts")  # all else in a result is numbers


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    for name, value in result.items():
        if name not in TEXTS and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            raise ValueError(f"{name} must be a number")
    return result


class Stored(Record):
    """A file of stored results."""

    options: dict[str, Any]
    result: Annotated[dict[str, Any], AfterValidator(_figures)]
    seconds: float
    began: str
    hardware: str
    versions: dict[str, str]


OVERHEAD = 15.0  # seconds of a run outside its steps (start, evaluations); a guess until one is measured


def key_of(job: Job) -> str:
    """A hash of the options of a run: equal options, equal key."""
    return hashlib.blake2b(json.dumps(job.options).encode(), digest_size=8).hexdigest()


class Results:
    """The stored results of runs, read from any number of folders; new ones go into the first.

    ``dtype`` replaces the precision that the jobs name.
    """

    def __init__(self, folder: Path, *others: Path, dtype: str | None = None):
        self.folder, self.others, self.dtype = folder, others, dtype

    def in_precision(self, job: Job) -> Job:
        """The job in the precision of these results."""
        return job if self.dtype is None else job.with_option("dtype", self.dtype)

    def get(self, job: Job) -> dict[str, Any] | None:
        """The stored content of a run: ``result`` as in its result.json, ``options``, ``seconds``, machine, versions;
        None if the run is missing."""
        job = self.in_precision(job)
        for folder in (self.folder, *self.others):
            path = folder / f"{key_of(job)}.json"
            if path.exists():
                return _checked(path, job)
        return None

    def put(self, job: Job, run: Run) -> float:
        """Stores a complete run, or the step at which it diverged. Returns the seconds that its steps took."""
        job = self.in_precision(job)
        self.folder.mkdir(parents=True, exist_ok=True)
        run.require("began", "device", "dtype", "versions")
        config, seconds = run.config, 0.0
        for row in run.rows("steps"):
            require_keys(f"{run.path / 'steps.jsonl'}, step {row['step']},", row, ["seconds"])
            seconds += row["seconds"]
        step = _diverged(run)
        result = run.result if step is None else {"diverged": step}
        by_domain = {name: row["nats"] for name, row in result.get("domains", {}).items()}
        write_json(
            self.folder / f"{key_of(job)}.json",
            {
                "options": dict(job.options),
                "result": {name: value for name, value in result.items() if name != "domains"},
                "domains": {name: None if nats is None else round(nats, 5) for name, nats in by_domain.items()},
                "seconds": round(seconds, 1),
                "began": config["began"],
                "hardware": f"{os.cpu_count()} CPU cores, one thread a run, {config['device']}, {config['dtype']}",
                "versions": config["versions"],
            },
        )
        return seconds

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs without a stored result, each once, in their order."""
        return [job for job in dict.fromkeys(jobs) if self.get(job) is None]


def _checked(path: Path, job: Job) -> dict[str, Any]:
    """The content of a result file. Raises ``EquipoiseError`` if it is damaged or belongs to another run."""
    try:
        stored: dict[str, Any] = read_json(path, Stored)
    except EquipoiseError as error:
        raise EquipoiseError(f"{error} To run it again, remove it.") from None
    if stored["options"] != dict(job.options):
        raise EquipoiseError(
            f"{path} must hold the result of the options that its name stands for: it holds another. Remove it."
        )
    return stored


def _diverged(run: Run) -> int | None:
    """The step at which the loss became infinite or NaN, which ends a run; None if it stayed finite."""
    last_rows = deque(run.rows("steps"), maxlen=1)
    return last_rows[0]["step"] if last_rows and last_rows[0].get("loss", 0.0) is None else None


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
            folder = work / key_of(job)
            command = [sys.executable, "-m", "equipoise", "train", "--out", str(folder), "--no-save-model", "--resume"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            is_new, start_time = not folder.exists(), time.monotonic()
            with open(work / f"{key_of(job)}.log", "wb") as log:
                process = start([*command, *job.arguments], stdout=log, stderr=log, env=environment)
                running[process] = job, start_time
                code = process.wait()
                del running[process]
            if stopped.is_set():
                return
            with lock:
                if code != 0 and not ((folder / "config.json").exists() and _diverged(Run(folder)) is not None):
                    log_text = (work / f"{key_of(job)}.log").read_text(errors="replace")
                    last_line = (log_text.strip().splitlines() or ["nothing"])[-1]
                    failures.append(
                        EquipoiseError(
                            f"every run must succeed: `equipoise train {' '.join(job.arguments)}` exited with {code}. "
                            f"Its last line was: {last_line}. Its folder is {folder}. Fix that and run the same "
                            "command again; finished runs are kept."
                        )
                    )
                    return
                seconds = results.put(job, Run(folder))
                shutil.rmtree(folder, ignore_errors=True)
                (work / f"{key_of(job)}.log").unlink(missing_ok=True)
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
