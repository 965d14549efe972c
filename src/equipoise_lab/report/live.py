"""The live page: the report, written again and again until all runs are finished."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis.reader import RecordedRun
from equipoise_lab.analysis.tables import Records, read_records
from equipoise_lab.paths import suggest_paths
from equipoise_lab.records import LOCK, Comparison, read_json
from equipoise_lab.report.page import Live, write_page, write_report

__all__ = ["write_live"]

NOT_TRAINING = "Nothing trains now: a run was stopped, or has failed. --resume goes on; Ctrl-C ends the live page."
SILENT = 60  # seconds without a new step that the page mentions


def write_live(folder: Path, seconds: int, say: Callable[[str], None]) -> Path:
    """Writes ``report.html`` every ``seconds``, until every run is finished. Returns the path.

    A browser that shows the page loads it again each time. At the end, when it is interrupted, or when a run cannot be
    read any more, the page becomes a usual one. ``say`` gets a line with the path, and one whenever there is nothing to
    show or nothing trains.

    Raises ``EquipoiseError`` if ``folder`` holds an audit.
    """
    path: Path | None = None
    shown: Records | None = None
    said = ""
    try:
        while True:
            is_training = _is_in_use(folder)  # asked first: a run may end while it is read
            records = _read(folder)
            if records is None or not any(run.steps or run.evaluation for run in records.recorded_runs):
                path, state = None, _waiting(folder)
            else:
                total = _num_runs(folder, records)
                if sum(run.result is not None for run in records.recorded_runs) >= total:
                    break
                state = "" if is_training else NOT_TRAINING
                progress = f"{_progress(records, total)} {state}".rstrip()
                page = write_page(folder, records, Live(seconds, time.strftime("%H:%M:%S"), progress))
                if path is None:
                    say(f"open {page} in a browser; it loads itself again every {seconds} seconds")
                path, shown = page, records
            if state != said and state:
                say(state)
            said = state
            time.sleep(seconds)
    except (KeyboardInterrupt, EquipoiseError):
        if path is not None and shown is not None:
            try:
                write_report(folder)
            except (EquipoiseError, OSError):  # a run is damaged, or the folder is gone
                with suppress(EquipoiseError, OSError):
                    write_page(folder, shown)
        raise
    return write_report(folder, say)


def _waiting(folder: Path) -> str:
    missing = "" if folder.is_dir() else f", which does not exist yet.{suggest_paths(folder)}"
    return f"waiting for a first step in {folder}{missing}"


def _is_in_use(folder: Path) -> bool:
    """Whether a process trains in the folder. One that was killed may seem to do so."""
    return any(path.exists() for path in (folder / LOCK, *folder.glob(f"*/{LOCK}")))


def _read(folder: Path) -> Records | None:
    """None if ``folder`` has no run yet."""
    if not folder.is_dir() or not ((folder / "config.json").exists() or any(folder.glob("*/config.json"))):
        if (folder / "audit.json").exists():
            raise EquipoiseError(f"--live needs runs: {folder} holds an audit, which does not train. Leave --live out.")
        return None
    return read_records(folder)


def _num_runs(folder: Path, records: Records) -> int:
    """How many runs there will be. A comparison says so in ``compare.json``."""
    num_runs = len(records.recorded_runs)
    path = folder / "compare.json"
    if not path.is_file():
        return num_runs
    options = read_json(path, Comparison)["options"]
    return max(num_runs, len(options["strategies"]) * options["seeds"])


def _progress(records: Records, total: int) -> str:
    """One sentence: how many runs are finished, and the step of each run that trains."""
    training = [_state_of(run) for run in records.recorded_runs if run.result is None]
    num_finished = len(records.recorded_runs) - len(training)
    return "; ".join([*([f"{num_finished} of {total} runs finished"] if total > 1 else []), *training]) + "."


def _state_of(run: RecordedRun) -> str:
    state = f"{run.strategy}, seed {run.seed}: step {len(run.steps)} of {run.config['steps']}"
    steps = run.files.path / "steps.jsonl"
    age = time.time() - steps.stat().st_mtime if steps.exists() else 0.0
    return state if age < SILENT else f"{state}, no new step for {age / 60:.0f} min"
