"""The run folder: the only seam between training and analysis. Imports no torch.

A run is one strategy and one seed in one folder:

    config.json         the resolved configuration, versions, wrapper, names of the MoE layers (written once)
    steps.jsonl         one line a step: step, loss, maxvio_batch, ..., tokens (so far), seconds (of this step);
                        strategy (of this step) in a run that changes it, and alerts (sentences) where some began
                        or were over
    loads.jsonl         one line a step: step, load (layers x experts counts of the step, pooled over ranks)
    evaluations.jsonl   one line an evaluation: step, overall figures, and by domain nats, bits per byte, load and
                        top-k score sum (by layer)
    audit.json          what the experts did in the last evaluation, on the test text, in the format of `equipoise
                        audit`: tokens and nats by domain, and by layer load (by domain), score sums, experts chosen
                        together, the tokens typical of each; none in runs of before it was written, or where a
                        selection gives experts tokens, not tokens experts
    result.json         the last word, written when the run is complete
    checkpoints/        what a resumed run needs
    model/              the trained model, for plain Transformers

The three ``.jsonl`` files only grow. A line is written whole and flushed, so a run that is killed leaves at most one
torn line at the very end: reading drops that one, and any other damage is an error that names file and line.
A number that is not finite (a run that diverged) is written as null: every file is JSON for any reader.
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
LOCK = ".lock"  # of the process that trains there


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: None for every number that is not finite.

    >>> finite({"loss": float("nan"), "load": [1, 2]})
    {'loss': None, 'load': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_new(folder: Path) -> bool:
    """Whether ``folder`` is not there, or holds nothing but what a kill left of its very first file."""
    first = {".config.json.tmp", ".compare.json.tmp", LOCK}
    return not folder.is_dir() or all(path.name in first for path in folder.iterdir())


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` so that ``path`` holds either the old text or the new one, whatever happens in between."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(finite(value), file, ensure_ascii=False, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EquipoiseError(
            f"A run folder must hold {path.name}: {path} does not exist. The run was cut short before it began, or "
            "this is no run folder; train again into a new folder."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EquipoiseError(
            f"{path} must be JSON: {error}. The file is damaged; restore it, or make it again (a run: remove its "
            "folder and train; an audit: the same `equipoise audit`)."
        ) from None


class Run:
    """One run folder. ``Run.create`` begins one, ``Run(path)`` opens one; reading never changes anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        found = self.config.get("format") if isinstance(self.config, dict) else None
        if found is None and isinstance(self.config, dict) and "model_type" in self.config:
            raise EquipoiseError(
                f"A run folder must hold a run: {self.path} holds a model of Transformers. Give the folder that was "
                "passed as --out to `equipoise compare`, `train` or `audit`."
            )
        if found != FORMAT:
            raise EquipoiseError(
                f"{self.path / 'config.json'} must have format {FORMAT}: got {found!r}. It was written by another "
                "version of equipoise; read it with that one, or train again."
            )

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> "Run":
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", {"format": FORMAT, **config})
        return cls(path)

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """Adds one line to ``steps``, ``loads`` or ``evaluations``."""
        assert log in LOGS, log
        with open(self.path / f"{log}.jsonl", "ab") as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Brings the logs to the disk: what a checkpoint stands on must not be lost when it is kept."""
        for path in (self.path / f"{log}.jsonl" for log in LOGS):
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def rows(self, log: str) -> Iterator[dict[str, Any]]:
        """The lines of a log, oldest first. A torn last line, which a kill leaves, is dropped."""
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
                    f"{path} must hold one JSON object a line: line {number} is damaged ({error}). Restore the file, "
                    "or cut it before that line and resume the run."
                ) from None
            yield row

    def rewind(self, step: int) -> None:
        """Drops every line after ``step``: what a resumed run does before it goes on from its checkpoint."""
        for log in LOGS:
            path = self.path / f"{log}.jsonl"
            if not path.exists():
                continue
            kept = [row for row in self.rows(log) if row["step"] <= step]
            aside = path.with_name(f".{path.name}.tmp")
            with open(aside, "wb") as file:
                file.writelines(map(_line, kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
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
    """The runs in ``folder`` (or the one that it is), in the order in which they began. None at all is an error."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"A folder of runs must be there: {folder} {what}. Give the folder that was passed as --out.")
    places = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    if not places:
        raise UsageError(
            f"{folder} must hold runs, each a folder with a config.json: it holds none. Give the folder that was "
            "passed as --out to `equipoise compare` or `equipoise train`."
        )
    return sorted(map(Run, places), key=lambda run: (run.config.get("began", ""), run.path.name))
