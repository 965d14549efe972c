"""A run folder: opened, read line by line, and written."""

import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.paths import suggest_paths
from equipoise_lab.records.files import (
    check,
    finite,
    open_record,
    parse,
    read_at_most,
    read_json,
    require_keys,
    write_json,
    write_parts,
)
from equipoise_lab.records.schemas import LOGS, Config, Result

__all__ = ["LOCK", "OPTIONS_OF_COMPARISON", "OPTIONS_OF_RUN", "Run", "find_runs", "is_new"]

FORMAT = 1
LOCK = ".lock"  # lock file of the process that trains in the folder
OPTIONS_OF_RUN, OPTIONS_OF_COMPARISON = "run.yaml", "compare.yaml"  # copies of the options for people, see --config
FIRST_FILES = ("config.json", "compare.json", OPTIONS_OF_RUN, OPTIONS_OF_COMPARISON)
LEFTOVERS = {*(f".{name}.tmp" for name in FIRST_FILES), LOCK}  # of a process that is killed before its first file


def is_new(folder: Path) -> bool:
    """Whether nothing in ``folder`` is worth keeping, so that a new run may start there.

    It is missing or empty, or has only the config and lock files of runs that stopped before their first step.
    """
    if not folder.is_dir():
        return True
    names = {path.name for path in folder.iterdir()} - LEFTOVERS
    if "config.json" in names and names <= {"config.json", OPTIONS_OF_RUN}:
        return _is_run(folder / "config.json")
    others = names - {"compare.json", OPTIONS_OF_COMPARISON}
    return not names or ("compare.json" in names and all(_is_new_run(folder / name) for name in others))


def _is_new_run(folder: Path) -> bool:
    return folder.is_dir() and is_new(folder)


def _is_run(config: Path) -> bool:
    try:
        content = read_json(config)
    except EquipoiseError:
        return False  # it may be somebody else's
    return isinstance(content, dict) and {"format", "strategy"} <= content.keys()


class Run:
    """A run folder. ``Run.create`` creates one and ``Run(path)`` opens one. Reading never changes anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        path = self.path / "config.json"
        self.config: dict[str, Any] = read_json(path)
        file_format = self.config.get("format") if isinstance(self.config, dict) else None
        if file_format is None and isinstance(self.config, dict) and "model_type" in self.config:
            raise EquipoiseError(
                f"A run folder must contain a run: {self.path} contains a Transformers model. Give the folder that was "
                "passed as --out to `equipoise compare`, `train` or `audit`."
            )
        if file_format is True or file_format != FORMAT:
            raise EquipoiseError(
                f"{path} must have format {FORMAT}: got {file_format!r}. It was written by "
                "another version of equipoise. Read it with that version, or train again."
            )
        check(str(path), self.config, Config)

    def require(self, *keys: str) -> None:
        """Raises ``EquipoiseError`` unless config.json has these keys."""
        require_keys(str(self.path / "config.json"), self.config, keys)

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
        number, last = 0, 0
        with open_record(path) as file:
            while line := read_at_most(file, path, line=True):
                number += 1
                if line == b"\n":
                    continue
                try:
                    row = parse(line)
                    if not isinstance(row, dict) or "step" not in row:
                        raise ValueError("not an object with a step")
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        return
                    raise EquipoiseError(
                        f"{path} must have one JSON object per line: line {number} is damaged ({error}). Restore the "
                        "file, or remove everything from that line on and resume the run."
                    ) from None
                self._check(f"{path}, line {number},", log, row, last)
                last = row["step"]
                yield row

    def _check(self, where: str, log: str, row: dict[str, Any], last: int) -> None:
        """``last``: the step of the line before, or 0."""
        check(where, row, LOGS[log])
        # There may be two evaluations after the last step.
        if row["step"] != last + 1 if log != "evaluations" else row["step"] < last:
            raise EquipoiseError(
                f"{where} must follow step {last}: it is of step {row['step']}. A line is missing or out of place. "
                "Restore the file, or train again."
            )
        if log == "loads":
            self._check_load(where, row["load"])
        for name, domain in row.get("domains", {}).items() if log == "evaluations" else ():
            self._check_load(f"{where} for domain {name!r}", domain.get("load"))

    def _check_load(self, where: str, load: list[list[int]] | None) -> None:
        layers, experts = self.config.get("layers"), self.config.get("num_experts")
        if load is None or layers is None or experts is None:
            return
        sizes = [len(layer) for layer in load]
        if sizes != [experts] * len(layers):
            raise EquipoiseError(
                f"{where} must contain the load of {len(layers)} layers of {experts} experts: it has layers of "
                f"{reprlib.repr(sizes)} experts. The file is damaged; restore it or train again."
            )

    def rewind(self, step: int) -> None:
        """Removes every line after ``step``. A resumed run does so before it continues from its checkpoint."""
        for log in LOGS:
            path = self.path / f"{log}.jsonl"
            if not path.exists():
                continue
            remaining = [row for row in self.rows(log) if row["step"] <= step]
            write_parts(path, map(_line, remaining))
        for name in ("audit.json", "result.json"):
            (self.path / name).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json", Result)

    def finish(self, result: Mapping[str, Any]) -> None:
        write_json(self.path / "result.json", dict(result))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(row), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def find_runs(folder: str | Path) -> list[Run]:
    """The runs in ``folder``, in the order of their start. ``folder`` may also be a run. No run at all is an error."""
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        hint = "" if folder.exists() else suggest_paths(folder)
        raise UsageError(
            f"Runs are read from a folder: {folder} {problem}. Give the folder that was passed as --out.{hint}"
        )
    paths = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    if not paths:
        raise UsageError(
            f"{folder} must contain runs, each a folder with a config.json: it contains none. Give the folder that was "
            "passed as --out to `equipoise compare` or `equipoise train`."
        )
    return sorted(map(Run, paths), key=lambda run: (run.config.get("began", ""), run.path.name))
