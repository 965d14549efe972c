"""The run folder: the only interface between training and analysis. Imports no torch.

A run is one strategy and one seed in one folder:

    config.json         the resolved configuration, versions, wrapper, names of the MoE layers (written once)
    steps.jsonl         one line per step: step, loss, maxvio_batch, ..., tokens (so far), seconds (of this step);
                        also strategy (of this step) in a run that changes it, and alerts (sentences) if some started
                        or ended
    loads.jsonl         one line per step: step, load (layers x experts counts of the step, pooled over ranks)
    evaluations.jsonl   one line per evaluation: step, overall figures, and by domain nats, bits per byte, load and
                        top-k score sum (by layer)
    audit.json          what the experts did in the last evaluation, on the test text, in the format of `equipoise
                        audit`: tokens and nats by domain, and by layer load (by domain), score sums, experts chosen
                        together and typical tokens of each expert; missing in old runs, and if a selection lets
                        experts choose tokens
    result.json         the result, written when the run is complete
    checkpoints/        what a resumed run needs
    model/              the trained model, for plain Transformers

The three ``.jsonl`` files only grow. A line is written in one piece and flushed. So a killed run leaves at most one
torn line, at the end. Reading drops that line; any other damage is an error that names the file and the line. A number
that is not finite (in a run that diverged) is written as null, so that every reader can parse the files as JSON.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError, UsageError

__all__ = ["LOCK", "Run", "find_runs", "finite", "is_new", "read_json", "write_json"]

FORMAT = 1
LOGS = ("steps", "loads", "evaluations")
LOCK = ".lock"  # lock file of the process that trains in the folder


def finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite, which JSON cannot represent.

    >>> finite({"loss": float("nan"), "load": [1, 2]})
    {'loss': None, 'load': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_new(folder: Path) -> bool:
    """Whether ``folder`` is missing or empty. Ignores what a process leaves that is killed before its first file."""
    ignored = {".config.json.tmp", ".compare.json.tmp", LOCK}
    return not folder.is_dir() or all(path.name in ignored for path in folder.iterdir())


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically: ``path`` has either the old content or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(finite(value), file, ensure_ascii=False, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EquipoiseError(
            f"A run folder must contain {path.name}: {path} does not exist. Either the run was stopped before it "
            "started, or this is no run folder. Train again into a new folder."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EquipoiseError(
            f"{path} must be JSON: {error}. The file is damaged. Restore it, or create it again (a run: remove its "
            "folder and train; an audit: repeat the same `equipoise audit`)."
        ) from None


class Run:
    """A run folder. ``Run.create`` creates one and ``Run(path)`` opens one. Reading never changes anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        file_format = self.config.get("format") if isinstance(self.config, dict) else None
        if file_format is None and isinstance(self.config, dict) and "model_type" in self.config:
            raise EquipoiseError(
                f"A run folder must contain a run: {self.path} contains a Transformers model. Give the folder that was "
                "passed as --out to `equipoise compare`, `train` or `audit`."
            )
        if file_format != FORMAT:
            raise EquipoiseError(
                f"{self.path / 'config.json'} must have format {FORMAT}: got {file_format!r}. It was written by "
                "another version of equipoise. Read it with that version, or train again."
            )

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> "Run":
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", {"format": FORMAT, **config})
        return cls(path)

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """Appends one line to ``steps``, ``loads`` or ``evaluations``."""
        assert log in LOGS, log
        with open(self.path / f"{log}.jsonl", "ab") as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Flushes the logs to the disk. A checkpoint must not survive a crash without the records before it."""
        for path in (self.path / f"{log}.jsonl" for log in LOGS):
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def rows(self, log: str) -> Iterator[dict[str, Any]]:
        """The lines of a log, oldest first. Drops a torn last line, which a killed process leaves."""
        assert log in LOGS, log
        path = self.path / f"{log}.jsonl"
        if not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or "step" not in row:
                    raise ValueError("not an object with a step")
            except ValueError as error:
                if number == len(lines):
                    return
                raise EquipoiseError(
                    f"{path} must have one JSON object per line: line {number} is damaged ({error}). Restore the file, "
                    "or remove everything from that line on and resume the run."
                ) from None
            yield row

    def rewind(self, step: int) -> None:
        """Removes every line after ``step``. A resumed run does so before it continues from its checkpoint."""
        for log in LOGS:
            path = self.path / f"{log}.jsonl"
            if not path.exists():
                continue
            remaining = [row for row in self.rows(log) if row["step"] <= step]
            temporary = path.with_name(f".{path.name}.tmp")
            with open(temporary, "wb") as file:
                file.writelines(map(_line, remaining))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        for name in ("audit.json", "result.json"):
            (self.path / name).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def finish(self, result: Mapping[str, Any]) -> None:
        write_json(self.path / "result.json", dict(result))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(row), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def find_runs(folder: str | Path) -> list[Run]:
    """The runs in ``folder``, in the order of their start. ``folder`` may also be a run. No run at all is an error."""
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"Runs are read from a folder: {folder} {problem}. Give the folder that was passed as --out.")
    paths = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    if not paths:
        raise UsageError(
            f"{folder} must contain runs, each a folder with a config.json: it contains none. Give the folder that was "
            "passed as --out to `equipoise compare` or `equipoise train`."
        )
    return sorted(map(Run, paths), key=lambda run: (run.config.get("began", ""), run.path.name))
