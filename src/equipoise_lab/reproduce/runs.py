"""The runs that claims need: which are there, which are missing, and getting those done. Imports no torch.

A run is a process of `equipoise train` with one thread, as many side by side as there are cores: small models are
faster so than one after another with all cores. Its result is one JSON file, named after a hash of its options, so that
claims that need the same run share it, and a result is found again wherever it was made.
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
from typing import Any, Protocol

from equipoise.errors import EquipoiseError
from equipoise_lab.records import Run, write_json
from equipoise_lab.reproduce.claim import Job

__all__ = ["Progress", "Results", "execute", "key_of"]

STORED: dict[str, type | tuple[type, ...]] = {
    "options": dict,
    "result": dict,
    "seconds": (int, float),
    "began": str,
    "hardware": str,
    "versions": dict,
}
BESIDES = 15.0  # seconds of a run besides its steps (start, evaluations), until one has been seen


def key_of(job: Job) -> str:
    """A name for the options of a run: equal options, equal name."""
    return hashlib.blake2b(json.dumps(job.options).encode(), digest_size=8).hexdigest()


class Results:
    """Results by run, read from any number of folders; new ones go into the first.

    With ``dtype`` they are those of the same runs in this precision, whatever the jobs name.
    """

    def __init__(self, folder: Path, *others: Path, dtype: str | None = None):
        self.folder, self.others, self.dtype = folder, others, dtype

    def asked(self, job: Job) -> Job:
        """The run as it is asked for here."""
        return job if self.dtype is None else job.with_option("dtype", self.dtype)

    def get(self, job: Job) -> dict[str, Any] | None:
        """What is stored of a run: ``result`` as in its result.json, ``options``, ``seconds``, machine and versions."""
        job = self.asked(job)
        for folder in (self.folder, *self.others):
            path = folder / f"{key_of(job)}.json"
            if path.exists():
                return _checked(path, job)
        return None

    def put(self, job: Job, run: Run) -> float:
        """Stores a complete run, or where it diverged; the seconds that its steps took."""
        job = self.asked(job)
        self.folder.mkdir(parents=True, exist_ok=True)
        config, seconds = run.config, sum(row["seconds"] for row in run.rows("steps"))
        step = _diverged(run)
        result = run.result if step is None else {"diverged": step, "domains": {}}
        by_domain = {name: row["nats"] for name, row in result["domains"].items()}
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
        """The jobs without a result, each once, in their order."""
        return [job for job in dict.fromkeys(jobs) if self.get(job) is None]


def _checked(path: Path, job: Job) -> dict[str, Any]:
    """What the file of a result holds; an error says what is wrong with it."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EquipoiseError(f"{path} must be JSON: {error}. Remove it, and its run is made again.") from None
    for name, kind in STORED.items():
        if not isinstance(stored, dict) or not isinstance(stored.get(name), kind):
            raise EquipoiseError(
                f"{path} must hold the {name} of a run: it does not. Remove it, and its run is made again."
            )
    if stored["options"] != dict(job.options):
        raise EquipoiseError(f"{path} must be the result of the options in its name: it is of others. Remove it.")
    return stored


def _diverged(run: Run) -> int | None:
    """The step at which the loss was not finite any more, which ends a run; None where it stayed finite."""
    last = deque(run.rows("steps"), maxlen=1)
    return last[0]["step"] if last and last[0].get("loss", 0.0) is None else None


class Progress(Protocol):
    """Who is told how the runs go on."""

    def say(self, text: str) -> None: ...

    def done(self, number: int, total: int, seconds_left: float | None) -> None: ...


def _kind(job: Job) -> Any:
    """Runs of one kind take about as long."""
    options = dict(job.options)
    return options.get("steps"), options.get("dtype")


def _expected_seconds(job: Job, took: Mapping[Any, list[float]]) -> float | None:
    """The median of what runs of its kind took; None if there was none yet."""
    known = took.get(_kind(job))
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
    """Gets the missing runs done, in their order, and says whether all are there.

    ``work`` holds the folders of runs under way; each is resumed where it was stopped and removed when its result is
    stored. With ``minutes``, no run is begun that is not expected to end within them. Ctrl-C stops the runs; what they
    checkpointed is kept. A run that diverges has a result that says so. One that fails stops the others from beginning,
    and is an error that names its folder.
    """
    todo, total = results.missing(jobs), len(list(dict.fromkeys(jobs)))
    began, lock = time.monotonic(), threading.Lock()
    took: dict[Any, list[float]] = {}  # by kind, seconds of the steps of the runs done here or stored
    besides: list[float] = []  # seconds that runs took here besides
    for job in dict.fromkeys(jobs):
        if (stored := results.get(job)) is not None:
            took.setdefault(_kind(results.asked(job)), []).append(stored["seconds"])
    failures: list[Exception] = []
    running: dict[Any, tuple[Job, float]] = {}  # by process, since when
    stopped = threading.Event()

    def expected(job: Job) -> float | None:
        of_steps = _expected_seconds(results.asked(job), took)
        return None if of_steps is None else of_steps + (statistics.median(besides) if besides else BESIDES)

    def left() -> float | None:
        """Until the last run has ended, when each begins as soon as a worker is free."""
        now, free = time.monotonic(), [0.0] * workers
        for since, each in [(now - since, expected(job)) for job, since in list(running.values())] + [
            (0.0, expected(job)) for job in todo
        ]:
            if each is None:
                return None
            free.sort()
            free[0] += max(0.0, each - since)
        return max(free)

    def next_job() -> Job | None:
        with lock:
            while todo and results.get(todo[0]) is not None:  # made elsewhere meanwhile
                todo.pop(0)
            if not todo or failures or stopped.is_set():
                return None
            if minutes is not None and time.monotonic() - began + (expected(todo[0]) or 0.0) > 60 * minutes:
                return None
            return results.asked(todo.pop(0))

    def worker() -> None:
        try:
            work_off()
        except Exception as error:  # of a thread: it must reach who waits
            failures.append(error)

    def work_off() -> None:
        while (job := next_job()) is not None:
            folder = work / key_of(job)
            command = [sys.executable, "-m", "equipoise", "train", "--out", str(folder), "--no-save-model", "--resume"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            is_new, since = not folder.exists(), time.monotonic()
            with open(work / f"{key_of(job)}.log", "wb") as log:
                process = start([*command, *job.arguments], stdout=log, stderr=log, env=environment)
                running[process] = job, since
                code = process.wait()
                del running[process]
            if stopped.is_set():
                return
            with lock:
                if code != 0 and not ((folder / "config.json").exists() and _diverged(Run(folder)) is not None):
                    said = (work / f"{key_of(job)}.log").read_text(errors="replace").strip().splitlines() or ["nothing"]
                    failures.append(
                        EquipoiseError(
                            f"every run must end: `equipoise train {' '.join(job.arguments)}` ended with {code} and "
                            f"said: {said[-1]}. Its folder is {folder}. Mend that and start again: what is done is "
                            "kept."
                        )
                    )
                    return
                seconds = results.put(job, Run(folder))
                shutil.rmtree(folder, ignore_errors=True)
                (work / f"{key_of(job)}.log").unlink(missing_ok=True)
                took.setdefault(_kind(job), []).append(seconds)
                if is_new:
                    besides.append(max(0.0, time.monotonic() - since - seconds))
                progress.done(total - len(results.missing(jobs)), total, left())

    work.mkdir(parents=True, exist_ok=True)
    progress.done(total - len(todo), total, left())
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
