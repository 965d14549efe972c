"""Tables of what runs and audits recorded, as pyarrow tables for pandas, polars, DuckDB or a notebook.

    read_records(folder) ──> Records ── runs, steps, domains, experts, typical_tokens, loads ──> pyarrow.Table

Every table begins with the keys ``run`` (the folder's name), ``strategy`` and ``seed``. Imports no torch.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis.reader import (
    Experts,
    Problem,
    RecordedRun,
    experts_of_audit,
    read_audit,
    read_runs,
    relative_message,
)
from equipoise_lab.records import find_runs

__all__ = ["Records", "read_records"]

MAX = 1e305  # of a number: sums of them are finite
KEYS = pa.schema([("run", pa.string()), ("strategy", pa.string()), ("seed", pa.int64())])


@dataclass(frozen=True)
class Records:
    """The runs and audits of a folder. ``problems`` names each one that could not be read completely, and why."""

    recorded_runs: tuple[RecordedRun, ...]
    audits: Mapping[str, dict[str, Any]]  # by name; only audits of models that no run here trained
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        """In one line. The tables have the content."""
        names = {
            "runs": [run.name for run in self.recorded_runs],
            "audits": list(self.audits),
            "problems": [problem.name for problem in self.problems],
        }
        shown = (f"{kind}={reprlib.repr(of_kind)}" for kind, of_kind in names.items() if of_kind)
        return f"Records of {len(self.recorded_runs)} runs and {len(self.audits)} audits ({', '.join(shown)})"

    @property
    def models(self) -> list[Experts]:
        """Every model with known expert loads: runs with an evaluation, then audits."""
        evaluated = [experts for run in self.recorded_runs if (experts := run.experts) is not None]
        return evaluated + [experts_of_audit(name, audit) for name, audit in self.audits.items()]

    def runs(self) -> pa.Table:
        """One row per run: ``finished``, the numbers of ``result.json`` (null until finished), ``config`` as JSON."""
        names: dict[str, None] = {}
        for run in self.recorded_runs:
            names |= dict.fromkeys(_numeric_keys(run.result or {}))
        rows = []
        for run in self.recorded_runs:
            row = {**_keys(run), "finished": run.result is not None}
            row |= {name: _float((run.result or {}).get(name)) for name in names if name not in row}
            rows.append(row | {"config": json.dumps(run.config, ensure_ascii=False)})
        columns = [(name, pa.float64()) for name in names if name != "seed"]
        schema = [("finished", pa.bool_()), *columns, ("config", pa.string())]
        return pa.Table.from_pylist(rows, pa.schema([*KEYS, *schema]))

    def steps(self) -> pa.Table:
        """One row per training step: ``step`` and every number recorded for it (see docs/reference/metrics.md)."""
        names: dict[str, None] = {}
        for run in self.recorded_runs:
            for row in run.steps:
                names |= dict.fromkeys(_numeric_keys(row))
        names.pop("step", None)
        rows = [
            {**_keys(run), "step": row["step"], **{name: _float(row.get(name)) for name in names}}
            for run in self.recorded_runs
            for row in run.steps
        ]
        columns = [(name, pa.float64()) for name in names]
        return pa.Table.from_pylist(rows, pa.schema([*KEYS, ("step", pa.int64()), *columns]))

    def domains(self) -> pa.Table:
        """One row per finished run and domain: ``nats`` and ``bits_per_byte`` on the test text at the end."""
        rows = [
            {
                **_keys(run),
                "domain": domain,
                **{name: _float(losses.get(name)) for name in ("nats", "bits_per_byte")},
            }
            for run in self.recorded_runs
            if run.result is not None
            for domain, losses in run.result["domains"].items()
        ]
        columns = [("domain", pa.string()), ("nats", pa.float64()), ("bits_per_byte", pa.float64())]
        return pa.Table.from_pylist(rows, pa.schema([*KEYS, *columns]))

    def experts(self) -> pa.Table:
        """One row per model, layer, domain and expert, from the last evaluation or the audit.

        - ``load``: assignments to the expert.
        - ``tokens``: tokens of the domain.
        - ``frequency``: load / tokens; k/E at chance.
        - ``relative_load``: load over the mean load of the layer's experts in this domain; 1 is even.
        """
        parts = []
        for model in self.models:
            for index, load in enumerate(model.load):
                domains, experts = load.shape
                tokens = np.repeat(model.num_tokens, experts)
                flat = load.reshape(-1)
                with np.errstate(invalid="ignore", divide="ignore"):
                    frequency, relative = flat / tokens, flat * experts / np.repeat(load.sum(-1), experts)
                parts.append(
                    _key_columns(model, flat.size)
                    | {
                        "layer": [model.layers[index]] * flat.size,
                        "domain": np.repeat(np.array(model.domains, object), experts),
                        "expert": np.tile(np.arange(experts), domains),
                        "load": flat,
                        "tokens": tokens,
                        "frequency": pa.array(frequency, from_pandas=True),
                        "relative_load": pa.array(relative, from_pandas=True),
                    }
                )
        columns = [
            ("layer", pa.string()),
            ("domain", pa.string()),
            ("expert", pa.int64()),
            ("load", pa.int64()),
            ("tokens", pa.int64()),
            ("frequency", pa.float64()),
            ("relative_load", pa.float64()),
        ]
        return _concatenated(parts, columns)

    def typical_tokens(self) -> pa.Table:
        """One row per model, layer, expert and typical token, in order of ``rank`` from 1.

        ``text``: the token. ``share`` and ``count``: how many of its occurrences chose the expert.
        """
        parts = []
        for model in self.models:
            for layer, experts in zip(model.layers, model.typical, strict=True):
                rows = [(e, r, t) for e, tokens in enumerate(experts) for r, t in enumerate(tokens, start=1)]
                parts.append(
                    _key_columns(model, len(rows))
                    | {
                        "layer": [layer] * len(rows),
                        "expert": [expert for expert, _, _ in rows],
                        "rank": [rank for _, rank, _ in rows],
                        "text": [token["text"] for _, _, token in rows],
                        "share": [token["share"] for _, _, token in rows],
                        "count": [token["count"] for _, _, token in rows],
                    }
                )
        columns = [
            ("layer", pa.string()),
            ("expert", pa.int64()),
            ("rank", pa.int64()),
            ("text", pa.string()),
            ("share", pa.float64()),
            ("count", pa.int64()),
        ]
        return _concatenated(parts, columns)

    def loads(self, most: int | None = None) -> pa.Table:
        """One row per run, step, layer and expert: ``load``, the assignments of the training batch over all ranks.

        This is the largest table: steps x layers x experts rows per run. ``most`` limits the points in time per run:
        loads of neighbouring steps are then added. ``step`` is the last of these steps, ``steps`` their number.
        """
        parts = []
        for run in self.recorded_runs:
            for last, num, load in summed_loads(run, most):
                layers, experts = load.shape
                parts.append(
                    _key_columns(run, load.size)
                    | {
                        "step": np.full(load.size, last),
                        "steps": np.full(load.size, num),
                        "layer": np.repeat(np.array(run.config["layers"], object), experts),
                        "expert": np.tile(np.arange(experts), layers),
                        "load": load.reshape(-1),
                    }
                )
        columns = [
            ("step", pa.int64()),
            ("steps", pa.int64()),
            ("layer", pa.string()),
            ("expert", pa.int64()),
            ("load", pa.int64()),
        ]
        return _concatenated(parts, columns)


def read_records(folder: str | Path) -> Records:
    """All runs and audits in ``folder``, which may also be a single run or audit itself.

    ``Records.problems`` names everything that cannot be read. Raises ``EquipoiseError`` if nothing can be read.

    >>> records = read_records("runs/demo")  # doctest: +SKIP
    >>> records.runs().select(["strategy", "seed", "val_nats", "maxvio_global"]).to_pandas()  # doctest: +SKIP
    """
    folder = Path(folder)
    audits, problems = _read_audits(folder)
    recorded_runs: Sequence[RecordedRun] = ()
    try:
        find_runs(folder)
        has_runs = True
    except EquipoiseError:
        # With neither runs nor audits, read_runs below raises the error that explains what is missing.
        has_runs = any(folder.glob("*/config.json")) or (folder / "config.json").exists() or not (audits or problems)
    if has_runs:
        recorded_runs, run_problems = read_runs(folder)
        problems = [*problems, *run_problems]
    if not recorded_runs and not audits:
        reasons = " ".join(f"{p.name}: {p.reason.rstrip('.')}." for p in problems)
        raise EquipoiseError(f"{folder} must contain a run or an audit that can be read: none can. {reasons}")
    return Records(tuple(recorded_runs), audits, tuple(problems))


def _read_audits(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The audits in ``folder`` and directly below it, except those that belong to a run."""
    audits: dict[str, dict[str, Any]] = {}
    problems = []
    is_audit = (folder / "audit.json").is_file()
    audit_folders = [folder] if is_audit else sorted(p.parent for p in folder.glob("*/audit.json"))
    for audit_folder in audit_folders:
        if (audit_folder / "config.json").exists():
            continue
        name = audit_folder.resolve().name
        try:
            audit = read_audit(audit_folder)
            assert audit is not None
            audits[name] = audit
        except EquipoiseError as error:
            problems.append(Problem(name, "damaged", relative_message(folder, error)))
    return audits, problems


def summed_loads(run: RecordedRun, most: int | None = None) -> Iterable[tuple[int, int, np.ndarray]]:
    """Loads summed over equal numbers of steps, at most ``most`` sums: (last step, steps, load by layer and expert)."""
    steps_per_sum = 1 if most is None else max(1, -(-len(run.steps) // most))
    total, last, steps = None, 0, 0
    for row in run.files.rows("loads"):
        load = np.array(row["load"], np.int64)
        total, last, steps = (load if total is None else total + load), row["step"], steps + 1
        if steps == steps_per_sum:
            yield last, steps, total
            total, steps = None, 0
    if total is not None:
        yield last, steps, total


def _keys(source: RecordedRun | Experts) -> dict[str, Any]:
    return {"run": source.name, "strategy": source.strategy, "seed": source.seed}


def _key_columns(source: RecordedRun | Experts, length: int) -> dict[str, Any]:
    return {name: pa.repeat(pa.scalar(value, KEYS.field(name).type), length) for name, value in _keys(source).items()}


def _concatenated(parts: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, pa.DataType]]) -> pa.Table:
    schema = pa.schema([*KEYS, *columns])
    tables = [pa.table(dict(part), schema=schema) for part in parts]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _numeric_keys(row: Mapping[str, Any]) -> list[str]:
    return [k for k, v in row.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))]


def _float(value: Any) -> float | None:
    """None for what is not a number, or too large for a float."""
    return float(value) if not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < MAX else None
