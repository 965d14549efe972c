"""Reads and checks runs and audits. A damaged one becomes a ``Problem``; the others are read all the same."""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis.summary import COLUMNS
from equipoise_lab.records import Audit, Run, check, find_runs, read_json, require_keys

__all__ = [
    "AUDIT",
    "Experts",
    "Problem",
    "RecordedRun",
    "experts_of_audit",
    "read_audit",
    "read_runs",
    "relative_message",
]

AUDIT = "audit.json"
AUDIT_FORMAT = 1

SETTINGS = ("strategy", "seed", "steps", "num_experts", "layers", "domains")


@dataclass(frozen=True)
class Problem:
    """Why a run or an audit is missing from the comparison, wholly or in part."""

    name: str
    kind: str  # "unfinished", "damaged", "left out", "without an evaluation", "without its audit"
    reason: str


@dataclass(frozen=True)
class Experts:
    """The load of one model's experts on one text, and the tokens that chose them."""

    name: str  # of the run or the audit
    strategy: str  # for an audit, the name of the model
    seed: int | None
    step: int | None
    layers: list[str]
    domains: list[str]
    k: int
    load: list[Int[np.ndarray, "domains experts"]]  # assignments, by layer
    typical: list[list[list[dict[str, Any]]]]  # by layer and expert: tokens with text, share and count; [] if unknown
    partners: list[list[list[list[float]]]]  # by layer and expert: (other expert, share of tokens that chose it too)

    def __repr__(self) -> str:
        return f"Experts({self.name!r}: {len(self.layers)} layers, {len(self.domains)} domains, step {self.step})"

    @property
    def num_tokens(self) -> Int[np.ndarray, " domains"]:
        """The evaluated tokens of each domain."""
        return self.load[0].sum(-1) // self.k


@dataclass(frozen=True)
class RecordedRun:
    """What the files of one run hold, checked. ``result`` is None until the run is finished.

    ``evaluation`` is the last one, None before the first. ``audit`` is None if the folder has none.
    """

    files: Run
    name: str
    steps: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    result: dict[str, Any] | None
    audit: dict[str, Any] | None = None

    def __repr__(self) -> str:
        state = "finished" if self.result is not None else "not finished"
        done = f"{len(self.steps)} steps, {state}"
        return f"RecordedRun({self.name!r}: strategy {self.strategy!r}, seed {self.seed}, {done})"

    @property
    def config(self) -> dict[str, Any]:
        return self.files.config

    @property
    def strategy(self) -> str:
        return self.config["strategy"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def evaluations(self) -> Iterator[dict[str, Any]]:
        """Those with loads of every domain of the last one, oldest first: of each step the last."""
        pending: dict[str, Any] | None = None
        for row in self.files.rows("evaluations"):
            domains = row.get("domains", {})
            if not all("load" in domains.get(domain, {}) for domain in self.evaluated_domains):
                continue
            if pending is not None and row["step"] != pending["step"]:
                yield pending
            pending = row
        if pending is not None:
            yield pending

    @property
    def evaluated_domains(self) -> list[str]:
        """The domains of the last evaluation, in the order of the configuration."""
        by_domain = {} if self.evaluation is None else self.evaluation["domains"]
        domains = [domain for domain in self.config["domains"] if domain in by_domain]
        return domains + [domain for domain in by_domain if domain not in domains]

    def load_of(self, evaluation: Mapping[str, Any]) -> list[Int[np.ndarray, "domains experts"]]:
        """The load of each layer."""
        loads = [evaluation["domains"][domain]["load"] for domain in self.evaluated_domains]
        return [np.array([load[i] for load in loads], np.int64) for i in range(len(self.config["layers"]))]

    @property
    def experts(self) -> Experts | None:
        """From the last evaluation, with the audit's typical tokens and partners if both read the same text."""
        if self.evaluation is None:
            return None
        domains, layers, load = self.evaluated_domains, self.config["layers"], self.load_of(self.evaluation)
        k = self.config.get("experts_per_token") or 1
        typical: list[list[list[dict[str, Any]]]] = [[] for _ in layers]
        partners: list[list[list[list[float]]]] = [[] for _ in layers]
        if self.audit is not None and self.result is not None:
            audited = experts_of_audit(self.name, self.audit)
            if audited.domains == domains and audited.layers == layers and all(map(np.array_equal, audited.load, load)):
                typical, partners = audited.typical, audited.partners
        step = self.evaluation["step"]
        return Experts(self.name, self.strategy, self.seed, step, layers, domains, k, load, typical, partners)


def experts_of_audit(name: str, audit: dict[str, Any]) -> Experts:
    """``audit``: as ``read_audit`` returns it."""
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
    """The content of ``audit.json`` in ``folder``, or None if there is no such file.

    Raises ``EquipoiseError`` if the file is damaged or of another version.
    """
    path = Path(folder) / AUDIT
    if not path.is_file():
        return None
    audit = read_json(path)
    if isinstance(audit, dict) and audit.get("format", AUDIT_FORMAT) != AUDIT_FORMAT:
        raise EquipoiseError(
            f"{path} must have format {AUDIT_FORMAT}: got {audit['format']!r}. Another version of equipoise wrote it; "
            "audit the model again."
        )
    check(str(path), audit, Audit)
    require_keys(f"{path}, tokens,", audit["tokens"], audit["domains"])
    for layer in audit["layers"]:
        sizes = [len(row) for row in layer["load_by_domain"]]
        if sizes != [layer["experts"]] * len(audit["domains"]):
            raise EquipoiseError(
                f"{path} must contain the load of {layer['experts']} experts in {len(audit['domains'])} domains for "
                f"{layer['layer']}: its rows have lengths {sizes}. The file is damaged; audit the model again."
            )
        for name in ("typical_tokens", "partners"):
            if len(layer.get(name, [])) not in (0, layer["experts"]):
                raise EquipoiseError(
                    f"{path} must contain the {name} of {layer['experts']} experts for {layer['layer']}: it contains "
                    f"those of {len(layer[name])}. The file is damaged; audit the model again."
                )
    return audit


def read_runs(folder: str | Path) -> tuple[list[RecordedRun], list[Problem]]:
    """The readable runs below ``folder``, one per strategy and seed, and the problems of the others."""
    recorded_runs: dict[tuple[str, int], RecordedRun] = {}
    problems: list[Problem] = []
    for files in _find_readable_runs(Path(folder), problems):
        name = files.path.resolve().name
        try:
            run = _read_run(files, name)
        except (EquipoiseError, OSError) as error:
            problems.append(Problem(name, "damaged", relative_message(folder, error)))
            continue
        try:
            run = replace(run, audit=read_audit(files.path))
        except EquipoiseError as error:
            problems.append(Problem(name, "without its audit", relative_message(folder, error)))
        first = recorded_runs.setdefault((run.strategy, run.seed), run)
        if first is not run:
            reason = f"it has the same strategy and seed as {first.name}, which is shown"
            problems.append(Problem(name, "left out", reason))
        elif run.result is None:
            done = run.steps[-1]["step"] if run.steps else 0
            problems.append(Problem(name, "unfinished", f"not finished: {done} of {run.config['steps']} steps"))
        elif run.evaluation is None:
            problems.append(Problem(name, "without an evaluation", "so its experts are not drawn"))
    return list(recorded_runs.values()), problems


def _find_readable_runs(folder: Path, problems: list[Problem]) -> list[Run]:
    """The runs in and below ``folder``. If ``find_runs`` rejects one, the others are opened one by one."""
    try:
        return find_runs(folder)
    except EquipoiseError:
        run_folders = (
            [] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
        )
        if not run_folders:
            raise
    runs = []
    for run_folder in run_folders:
        try:
            runs += find_runs(run_folder)
        except EquipoiseError as error:
            problems.append(Problem(run_folder.name, "damaged", relative_message(folder, error)))
    return runs


def relative_message(folder: str | Path, error: Exception) -> str:
    """The message with paths relative to ``folder``, so that the page does not depend on where the folder is."""
    return str(error).replace(f"{Path(folder)}{os.sep}", "")


def _read_run(run: Run, name: str) -> RecordedRun:
    run.require(*SETTINGS)
    is_complete = run.complete  # asked first: a run that trains may end while it is read
    steps = list(run.rows("steps"))
    for row in steps:
        require_keys(f"{run.path / 'steps.jsonl'}, step {row['step']},", row, ("loss", "maxvio_batch"))
    num_loads = sum(1 for _ in run.rows("loads"))
    evaluation = next(iter(deque(run.rows("evaluations"), maxlen=1)), None)
    if evaluation is not None:
        where = f"{run.path / 'evaluations.jsonl'}, last line,"
        require_keys(where, evaluation, ["domains"])
        for domain, figures in evaluation["domains"].items():
            require_keys(f"{where} domain {domain!r},", figures, ["load"])
    result = run.result if is_complete else None
    if result is not None:
        require_keys(str(run.path / "result.json"), result, [*(column.key for column in COLUMNS), "domains"])
    for log, number in (("steps", len(steps)), ("loads", num_loads)):
        if result is not None and number != run.config["steps"]:
            raise EquipoiseError(
                f"{run.path / log}.jsonl must contain {run.config['steps']} steps, because the run is finished: it "
                f"contains {number}. Restore the file or train again."
            )
    if result is not None and evaluation is not None:
        _check_equal(run, evaluation, result)
    return RecordedRun(run, name, steps, evaluation, result)


def _check_equal(run: Run, evaluation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """The result of a finished run repeats its last evaluation, on the test text after the last step."""
    evaluated = {"step": evaluation["step"], "split": evaluation.get("split", "test")}
    stored = {"step": run.config["steps"], "split": "test"}
    for key in evaluation.keys() & result.keys() - {"domains"}:
        evaluated[key], stored[key] = evaluation[key], result[key]
    for domain, losses in result["domains"].items():
        figures = evaluation["domains"].get(domain, {})
        evaluated[f"nats of {domain}"], stored[f"nats of {domain}"] = (
            figures.get("nats", losses["nats"]),
            losses["nats"],
        )
    for key, value in stored.items():
        if evaluated[key] != value:
            raise EquipoiseError(
                f"The last line of {run.path / 'evaluations.jsonl'} must be what {run.path / 'result.json'} repeats: "
                f"{key} is {evaluated[key]!r} and {value!r}. One of them is damaged; restore it or train again."
            )
