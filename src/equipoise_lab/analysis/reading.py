"""folders -> readings: runs and audits, checked. One that cannot be read is named, and the others are still there."""

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis.summary import COLUMNS
from equipoise_lab.records import Run, find_runs, read_json

__all__ = ["AUDIT", "Experts", "Problem", "Reading", "experts_of_audit", "read_audit", "read_runs"]

AUDIT = "audit.json"
AUDIT_FORMAT = 1

SETTINGS = {"strategy": str, "seed": int, "steps": int, "num_experts": int, "layers": list, "domains": list}


@dataclass(frozen=True)
class Problem:
    """Why a run is not, or not wholly, in the comparison."""

    name: str
    kind: str  # "unfinished", "damaged", "left out", "without an evaluation", "without its audit"
    reason: str


@dataclass(frozen=True)
class Experts:
    """What the experts of one model did on one text."""

    name: str  # of the run or the audit
    strategy: str  # of an audit the model
    seed: int | None
    step: int | None
    layers: list[str]
    domains: list[str]
    k: int
    load: list[Int[np.ndarray, "domains experts"]]  # by layer, assignments
    typical: list[list[list[dict[str, Any]]]]  # by layer and expert, its tokens: text, share, count; [] if unknown
    partners: list[list[list[list[float]]]]  # by layer and expert, others that its tokens choose, and their share

    @property
    def num_tokens(self) -> Int[np.ndarray, " domains"]:
        """By domain."""
        return self.load[0].sum(-1) // self.k


@dataclass(frozen=True)
class Reading:
    """One run that could be read. ``result`` is None while it is not finished, ``audit`` where it has none."""

    run: Run
    name: str
    steps: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    result: dict[str, Any] | None
    audit: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.run.config

    @property
    def strategy(self) -> str:
        return self.config["strategy"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def experts(self) -> Experts | None:
        """Of the last evaluation, with the typical tokens of the audit where both are of the same text."""
        if self.evaluation is None:
            return None
        found = self.evaluation["domains"]
        domains = [domain for domain in self.config["domains"] if domain in found]
        domains += [domain for domain in found if domain not in domains]
        layers = self.config["layers"]
        load = [np.array([found[d]["load"][i] for d in domains], np.int64) for i in range(len(layers))]
        k = self.config.get("experts_per_token") or 1
        typical: list[list[list[dict[str, Any]]]] = [[] for _ in layers]
        partners: list[list[list[list[float]]]] = [[] for _ in layers]
        if self.audit is not None and self.result is not None:
            audited = experts_of_audit(self.name, self.audit)
            if audited.domains == domains and all(map(np.array_equal, audited.load, load)):
                typical, partners = audited.typical, audited.partners
        step = self.evaluation["step"]
        return Experts(self.name, self.strategy, self.seed, step, layers, domains, k, load, typical, partners)


def experts_of_audit(name: str, audit: dict[str, Any]) -> Experts:
    """``audit`` as ``read_audit`` gives it."""
    layers = audit["layers"]
    return Experts(
        name=name,
        strategy=str(audit.get("model", name)),
        seed=None,
        step=None,
        layers=[layer["layer"] for layer in layers],
        domains=list(audit["domains"]),
        k=layers[0]["k"],
        load=[np.array(layer["load_by_domain"], np.int64) for layer in layers],
        typical=[layer["typical_tokens"] for layer in layers],
        partners=[layer.get("partners", []) for layer in layers],
    )


def read_audit(folder: str | Path) -> dict[str, Any] | None:
    """What ``audit.json`` in ``folder`` holds; None where there is none. A damaged or foreign one is an error."""
    path = Path(folder) / AUDIT
    if not path.is_file():
        return None
    found = read_json(path)
    _must_hold(path, found, ["format", "domains", "layers", "tokens", "mean"])
    if found["format"] != AUDIT_FORMAT:
        raise EquipoiseError(
            f"{path} must have format {AUDIT_FORMAT}: got {found['format']!r}. It was written by another version of "
            "equipoise; audit the model again."
        )
    if not found["layers"]:
        raise EquipoiseError(f"{path} must hold a layer: it holds none. Audit the model again.")
    for layer in found["layers"]:
        _must_hold(path, layer, ["layer", "experts", "k", "load_by_domain", "typical_tokens", "maxvio"])
        sizes = [len(row) for row in layer["load_by_domain"]]
        if sizes != [layer["experts"]] * len(found["domains"]):
            raise EquipoiseError(
                f"{path} must hold {layer['experts']} experts of {len(found['domains'])} domains for {layer['layer']}: "
                f"its rows have {sizes}. The file is damaged; audit the model again."
            )
    return found


def read_runs(folder: str | Path) -> tuple[list[Reading], list[Problem]]:
    """All runs below ``folder`` that can be read, and what is wrong with others."""
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
        try:
            reading = replace(reading, audit=read_audit(run.path))
        except EquipoiseError as error:
            problems.append(Problem(name, "without its audit", _without(folder, error)))
        first = readings.setdefault((reading.strategy, reading.seed), reading)
        if first is not reading:
            reason = f"the same strategy and seed as {first.name}, which is shown"
            problems.append(Problem(name, "left out", reason))
        elif reading.result is None:
            done = reading.steps[-1]["step"] if reading.steps else 0
            problems.append(Problem(name, "unfinished", f"not finished: {done} of {reading.config['steps']} steps"))
        elif reading.evaluation is None:
            problems.append(Problem(name, "without an evaluation", "so its experts are not drawn"))
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
