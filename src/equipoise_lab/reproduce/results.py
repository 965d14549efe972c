"""The stored results of runs: one JSON file each, named by a hash of the options. Imports no torch.

So claims of an edition that need the same run share it, and a result counts wherever it was made. Each edition has a
folder of its own. A new version of its recipe leaves the results of the old one where they are, and ignores them.
"""

import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator

from equipoise.errors import EquipoiseError
from equipoise_lab.records import Record, Run, read_json, require_keys, write_json
from equipoise_lab.reproduce.jobs import Job, key_of
from equipoise_lab.reproduce.made_with import THREADS, MadeWith

__all__ = ["Results", "diverged_at"]

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
    recipe: NotRequired[int]  # results of the first edition name neither this, which is 1, nor what follows
    commit: NotRequired[str]
    cpu: NotRequired[str]
    threads: NotRequired[int]
    text: NotRequired[str]  # a fingerprint of the documents; the first results of the second edition lack it, too


class Results:
    """The stored results of runs of one edition, read from any number of folders; new ones go into the first.

    ``dtype`` replaces the precision that the jobs name. ``recipe`` is the version of the recipe that results must have.
    """

    def __init__(self, folder: Path, *others: Path, dtype: str | None = None, recipe: int = 1):
        self.folder, self.others, self.dtype, self.recipe = folder, others, dtype, recipe

    def in_precision(self, job: Job) -> Job:
        """The job in the precision of these results."""
        return job if self.dtype is None else job.with_option("dtype", self.dtype)

    def name(self, job: Job) -> str:
        """The name of the job's file, without its ending; also of the folder of the run in progress."""
        return f"{key_of(self.in_precision(job))}{self._ending}"

    @property
    def _ending(self) -> str:
        return "" if self.recipe == 1 else f"-{self.recipe}"

    def get(self, job: Job) -> dict[str, Any] | None:
        """The stored content of a run: ``result`` as in its result.json, ``options``, ``seconds``, what it was made
        with; None if the run is missing."""
        job = self.in_precision(job)
        for folder in (self.folder, *self.others):
            path = folder / f"{self.name(job)}.json"
            if path.exists():
                return self._checked(path, job)
        return None

    def _checked(self, path: Path, job: Job) -> dict[str, Any]:
        """The content of a result file. Raises ``EquipoiseError`` if it is damaged or belongs to another run."""
        try:
            stored: dict[str, Any] = read_json(path, Stored)
        except EquipoiseError as error:
            raise EquipoiseError(f"{error} To run it again, remove it.") from None
        if stored["options"] != dict(job.options) or stored.get("recipe", 1) != self.recipe:
            raise EquipoiseError(
                f"{path} must hold the result of the options and of the recipe that its name stands for: it holds "
                "another. Remove it."
            )
        return stored

    def put(self, job: Job, run: Run, made_with: MadeWith) -> float:
        """Stores a complete run, or the step at which it diverged. Returns the seconds that its steps took."""
        job = self.in_precision(job)
        self.folder.mkdir(parents=True, exist_ok=True)
        run.require("began", "device", "dtype", "versions")
        config, seconds = run.config, 0.0
        for row in run.rows("steps"):
            require_keys(f"{run.path / 'steps.jsonl'}, step {row['step']},", row, ["seconds"])
            seconds += row["seconds"]
        step = diverged_at(run)
        result = run.result if step is None else {"diverged": step}
        by_domain = {name: row["nats"] for name, row in result.get("domains", {}).items()}
        write_json(
            self.folder / f"{self.name(job)}.json",
            {
                "options": dict(job.options),
                "result": {name: value for name, value in result.items() if name != "domains"},
                "domains": {name: None if nats is None else round(nats, 5) for name, nats in by_domain.items()},
                "seconds": round(seconds, 1),
                "began": config["began"],
                "recipe": self.recipe,
                "commit": made_with.commit,
                "cpu": made_with.cpu,
                "threads": config.get("threads", THREADS),
                **({"text": config["corpus_fingerprint"]} if "corpus_fingerprint" in config else {}),
                "hardware": f"{os.cpu_count()} CPU cores, one thread a run, {config['device']}, {config['dtype']}",
                "versions": config["versions"],
            },
        )
        return seconds

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs without a stored result, each once, in their order."""
        return [job for job in dict.fromkeys(jobs) if self.get(job) is None]

    @property
    def num_results_of_other_recipes(self) -> int:
        """How many files hold results of another version of the recipe."""
        names = {path.stem for folder in (self.folder, *self.others) for path in folder.glob("*.json")}
        return sum(name.partition("-")[2] != self._ending.lstrip("-") for name in names)


def diverged_at(run: Run) -> int | None:
    """The step at which the loss became infinite or NaN, which ends a run; None if it stayed finite."""
    last_rows = deque(run.rows("steps"), maxlen=1)
    return last_rows[0]["step"] if last_rows and last_rows[0].get("loss", 0.0) is None else None
