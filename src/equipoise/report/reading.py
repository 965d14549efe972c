"""run folders -> what the page is drawn from. A run that cannot be read is named, and the others are still drawn."""

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.records import Run, find_runs
from equipoise.report.summary import COLUMNS

__all__ = ["Problem", "Reading", "read_runs"]

SETTINGS = {"strategy": str, "seed": int, "steps": int, "num_experts": int, "layers": list, "domains": list}


@dataclass(frozen=True)
class Problem:
    """Why a run is not, or not wholly, in the comparison."""

    name: str
    kind: str  # "unfinished", "damaged" or "left out"
    reason: str


@dataclass(frozen=True)
class Reading:
    """One run that could be read. ``result`` is None while it is not finished."""

    run: Run
    name: str
    steps: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    result: dict[str, Any] | None

    @property
    def config(self) -> dict[str, Any]:
        return self.run.config

    @property
    def strategy(self) -> str:
        return self.config["strategy"]

    @property
    def seed(self) -> int:
        return self.config["seed"]


def read_runs(folder: str | Path) -> tuple[list[Reading], list[Problem]]:
    """All runs below ``folder`` that can be read, and what is wrong with others. No evaluation at all is an error."""
    readings: dict[tuple[str, int], Reading] = {}
    problems: list[Problem] = []
    runs = _open(Path(folder), problems)
    for run in runs:
        name = run.path.resolve().name
        try:
            reading = _read(run, name)
        except (EquipoiseError, OSError) as error:
            problems.append(Problem(name, "damaged", _without(folder, error)))
            continue
        first = readings.setdefault((reading.strategy, reading.seed), reading)
        if first is not reading:
            reason = f"the same strategy and seed as {first.name}, which is shown"
            problems.append(Problem(name, "left out", reason))
        elif reading.result is None:
            done = reading.steps[-1]["step"] if reading.steps else 0
            problems.append(Problem(name, "unfinished", f"not finished: {done} of {reading.config['steps']} steps"))
        elif reading.evaluation is None:
            problems.append(Problem(name, "without an evaluation", "so its experts are not drawn"))
    if not any(reading.evaluation for reading in readings.values()):
        seen = "; ".join(f"{p.name}: {p.reason}" for p in problems) or "runs without one"
        raise EquipoiseError(
            f"A report needs one run with an evaluation: {folder} holds {seen}. Let a run reach its first evaluation, "
            "then write the report again."
        )
    return list(readings.values()), problems


def _open(folder: Path, problems: list[Problem]) -> list[Run]:
    try:
        return find_runs(folder)
    except EquipoiseError:
        places = [] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
        if not places:
            raise
    runs = []
    for place in places:
        try:
            runs += find_runs(place)
        except EquipoiseError as error:
            problems.append(Problem(place.name, "damaged", _without(folder, error)))
    return runs


def _without(folder: str | Path, error: Exception) -> str:
    """The message with paths from ``folder`` on: the page reads the same wherever the folder lies."""
    return str(error).replace(f"{Path(folder)}{os.sep}", "")


def _read(run: Run, name: str) -> Reading:
    config = run.config
    _must_hold(run.path / "config.json", config, SETTINGS)
    for key, kind in SETTINGS.items():
        if not isinstance(config[key], kind):
            raise EquipoiseError(
                f"{run.path / 'config.json'} must hold a {kind.__name__} as {key}: got {config[key]!r}. The file is "
                "damaged; restore it or train again."
            )
    steps = list(run.rows("steps"))
    evaluation = next(iter(deque(run.rows("evaluations"), maxlen=1)), None)
    if evaluation is not None:
        _check_evaluation(run.path / "evaluations.jsonl", config, evaluation)
    result = run.result if run.complete else None
    if result is not None:
        _must_hold(run.path / "result.json", result, [column.key for column in COLUMNS] + ["domains"])
        _check_result(run.path / "result.json", result)
        if len(steps) != config["steps"]:
            raise EquipoiseError(
                f"{run.path / 'steps.jsonl'} must hold the {config['steps']} steps of a finished run: it holds "
                f"{len(steps)}. Restore the file, or train again."
            )
    return Reading(run, name, steps, evaluation, result)


def _must_hold(path: Path, found: Any, keys: Iterable[str]) -> None:
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise EquipoiseError(
            f"{path} must hold {', '.join(missing)}: it does not. The file is damaged or of another version; "
            "train again."
        )


def _check_evaluation(path: Path, config: dict[str, Any], evaluation: dict[str, Any]) -> None:
    _must_hold(path, evaluation, ["domains"])
    layers, experts = len(config["layers"]), config["num_experts"]
    for domain, found in evaluation["domains"].items():
        _must_hold(path, found, ["load"])
        load = found["load"] if isinstance(found["load"], list) else []
        sizes = [len(layer) if isinstance(layer, list) else 0 for layer in load]
        if sizes != [experts] * layers:
            raise EquipoiseError(
                f"{path} must hold {layers} layers of {experts} experts for domain {domain!r}: the last line has "
                f"layers of sizes {sizes}. The file is damaged; restore it or train again."
            )


def _check_result(path: Path, result: dict[str, Any]) -> None:
    for column in COLUMNS:
        if not isinstance(result[column.key], int | float | None):
            raise EquipoiseError(
                f"{path} must hold a number as {column.key}: got {result[column.key]!r}. The file is damaged; restore "
                "it or train again."
            )
    for domain in result["domains"]:
        _must_hold(path, result["domains"][domain], ["nats"])
