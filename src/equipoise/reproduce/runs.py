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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from equipoise.errors import EquipoiseError
from equipoise.records import Run, read_json, write_json
from equipoise.reproduce.claim import Job

__all__ = ["Progress", "Results", "execute", "key_of"]


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
                stored = read_json(path)
                if stored["options"] != dict(job.options):
                    raise EquipoiseError(
                        f"{path} must be the result of the options in its name: it is of others. Remove it."
                    )
                return stored
        return None

    def put(self, job: Job, run: Run) -> float:
        """Stores a complete run; the seconds that its steps took."""
        job = self.asked(job)
        self.folder.mkdir(parents=True, exist_ok=True)
        config, seconds = run.config, sum(row["seconds"] for row in run.rows("steps"))
        write_json(
            self.folder / f"{key_of(job)}.json",
            {
                "options": dict(job.options),
                "result": {name: value for name, value in run.result.items() if name != "domains"},
                "domains": {name: round(row["nats"], 5) for name, row in run.result["domains"].items()},
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
    checkpointed is kept. A run that fails stops the others from beginning, and is an error that names its folder.
    """
    todo, total = results.missing(jobs), len(list(dict.fromkeys(jobs)))
    began, lock = time.monotonic(), threading.Lock()
    took: dict[Any, list[float]] = {}  # by kind, seconds of the runs done here or stored
    for job in dict.fromkeys(jobs):
        if (stored := results.get(job)) is not None:
            took.setdefault(_kind(results.asked(job)), []).append(stored["seconds"])
    failures: list[EquipoiseError] = []
    running: dict[Any, None] = {}
    stopped = threading.Event()

    def left() -> float | None:
        waiting = [_expected_seconds(results.asked(job), took) for job in todo]
        if any(each is None for each in waiting):
            return None
        return sum(each for each in waiting if each is not None) / workers

    def next_job() -> Job | None:
        with lock:
            if not todo or failures or stopped.is_set():
                return None
            expected = _expected_seconds(results.asked(todo[0]), took) or 0.0
            if minutes is not None and time.monotonic() - began + expected > 60 * minutes:
                return None
            return results.asked(todo.pop(0))

    def worker() -> None:
        while (job := next_job()) is not None:
            folder = work / key_of(job)
            command = [sys.executable, "-m", "equipoise", "train", "--out", str(folder), "--no-save-model", "--resume"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with open(work / f"{key_of(job)}.log", "wb") as log:
                process = start([*command, *job.arguments], stdout=log, stderr=log, env=environment)
                running[process] = None
                code = process.wait()
                del running[process]
            if stopped.is_set():
                return
            with lock:
                if code != 0:
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
