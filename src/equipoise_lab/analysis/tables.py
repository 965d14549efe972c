"""folders -> tables: what runs and audits recorded, in pyarrow's columns for pandas, polars, DuckDB or a notebook.

    read_records(folder) ──> Records ── runs, steps, domains, experts, typical_tokens, loads ──> pyarrow.Table

Every table begins with ``run`` (the folder's name), ``strategy`` and ``seed``, by which tables are joined. Imports no
torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis.reading import (
    Experts,
    Problem,
    Reading,
    experts_of_audit,
    read_audit,
    read_runs,
)
from equipoise_lab.records import find_runs

__all__ = ["Records", "read_records"]

KEYS = pa.schema([("run", pa.string()), ("strategy", pa.string()), ("seed", pa.int64())])


@dataclass(frozen=True)
class Records:
    """What could be read below a folder, and what could not: ``problems`` names each run that is not, or not wholly,
    there, with the reason."""

    readings: tuple[Reading, ...]
    audits: Mapping[str, dict[str, Any]]  # by name, of models that no run here trained
    problems: tuple[Problem, ...]

    @property
    def models(self) -> list[Experts]:
        """Every model of which a choice of experts is known, runs first."""
        of_runs = [reading.experts for reading in self.readings]
        return [e for e in of_runs if e is not None] + [experts_of_audit(n, a) for n, a in self.audits.items()]

    def runs(self) -> pa.Table:
        """A row a run: whether it is ``finished``, its figures (those of ``result.json``; null before) and ``config``,
        JSON."""
        names: dict[str, None] = {}
        for reading in self.readings:
            names |= dict.fromkeys(_numbers(reading.result or {}))
        rows = []
        for reading in self.readings:
            row = {**_keys(reading), "finished": reading.result is not None}
            row |= {name: _float((reading.result or {}).get(name)) for name in names if name not in row}
            rows.append(row | {"config": json.dumps(reading.config, ensure_ascii=False)})
        figures = [(name, pa.float64()) for name in names if name != "seed"]
        schema = [("finished", pa.bool_()), *figures, ("config", pa.string())]
        return pa.Table.from_pylist(rows, pa.schema([*KEYS, *schema]))

    def steps(self) -> pa.Table:
        """A row a training step: ``step`` and every number that was recorded of it (see docs/metrics.md)."""
        names: dict[str, None] = {}
        for reading in self.readings:
            for row in reading.steps:
                names |= dict.fromkeys(_numbers(row))
        names.pop("step", None)
        rows = [
            {**_keys(reading), "step": row["step"], **{name: _float(row.get(name)) for name in names}}
            for reading in self.readings
            for row in reading.steps
        ]
        figures = [(name, pa.float64()) for name in names]
        return pa.Table.from_pylist(rows, pa.schema([*KEYS, ("step", pa.int64()), *figures]))

    def domains(self) -> pa.Table:
        """A row a run and domain: ``nats`` and ``bits_per_byte`` on the test text at the end."""
        rows = [
            {
                **_keys(reading),
                "domain": domain,
                **{name: _float(found.get(name)) for name in ("nats", "bits_per_byte")},
            }
            for reading in self.readings
            if reading.result is not None
            for domain, found in reading.result["domains"].items()
        ]
        figures = [("domain", pa.string()), ("nats", pa.float64()), ("bits_per_byte", pa.float64())]
        return pa.Table.from_pylist(rows, pa.schema([*KEYS, *figures]))

    def experts(self) -> pa.Table:
        """A row a model, layer, domain and expert, of the last evaluation or the audit.

        ``load``: assignments, ``tokens``: of the domain, ``frequency``: load / tokens, which is k/E at chance,
        ``relative_load``: load over the mean load of the domain's experts, 1 where even.
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
                    _same(model, flat.size)
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
        figures = [
            ("layer", pa.string()),
            ("domain", pa.string()),
            ("expert", pa.int64()),
            ("load", pa.int64()),
            ("tokens", pa.int64()),
            ("frequency", pa.float64()),
            ("relative_load", pa.float64()),
        ]
        return _stacked(parts, figures)

    def typical_tokens(self) -> pa.Table:
        """A row a model, layer, expert and ``rank`` (from 1) of its most typical tokens: ``text``, ``share`` of the
        token's occurrences that go to the expert, and their ``count``."""
        parts = []
        for model in self.models:
            for layer, experts in zip(model.layers, model.typical, strict=True):
                found = [(e, r, t) for e, tokens in enumerate(experts) for r, t in enumerate(tokens, start=1)]
                parts.append(
                    _same(model, len(found))
                    | {
                        "layer": [layer] * len(found),
                        "expert": [expert for expert, _, _ in found],
                        "rank": [rank for _, rank, _ in found],
                        "text": [token["text"] for _, _, token in found],
                        "share": [token["share"] for _, _, token in found],
                        "count": [token["count"] for _, _, token in found],
                    }
                )
        figures = [
            ("layer", pa.string()),
            ("expert", pa.int64()),
            ("rank", pa.int64()),
            ("text", pa.string()),
            ("share", pa.float64()),
            ("count", pa.int64()),
        ]
        return _stacked(parts, figures)

    def loads(self, most: int | None = None) -> pa.Table:
        """A row a run, step, layer and expert: ``load``, assignments of the training batch, pooled over ranks.

        It is the largest table, steps x layers x experts rows a run. With ``most`` each run has at most that many rows
        of time: loads of neighbouring steps are added, and ``step`` is the last of them, ``steps`` how many.
        """
        parts = []
        for reading in self.readings:
            for last, num, load in summed_loads(reading, most):
                layers, experts = load.shape
                parts.append(
                    _same(reading, load.size)
                    | {
                        "step": np.full(load.size, last),
                        "steps": np.full(load.size, num),
                        "layer": np.repeat(np.array(reading.config["layers"], object), experts),
                        "expert": np.tile(np.arange(experts), layers),
                        "load": load.reshape(-1),
                    }
                )
        figures = [
            ("step", pa.int64()),
            ("steps", pa.int64()),
            ("layer", pa.string()),
            ("expert", pa.int64()),
            ("load", pa.int64()),
        ]
        return _stacked(parts, figures)


def read_records(folder: str | Path) -> Records:
    """All runs and audits in ``folder``, or the one that it is.

    What cannot be read is named in ``problems``, never left out in silence. Raises ``EquipoiseError`` where nothing can
    be read.

    >>> records = read_records("runs/demo")  # doctest: +SKIP
    >>> records.runs().select(["strategy", "seed", "val_nats", "maxvio_global"]).to_pandas()  # doctest: +SKIP
    """
    folder = Path(folder)
    audits, problems = _audits(folder)
    readings: Sequence[Reading] = ()
    try:
        find_runs(folder)
        there = True
    except EquipoiseError:
        there = any(folder.glob("*/config.json")) or (folder / "config.json").exists() or not (audits or problems)
    if there:
        readings, more = read_runs(folder)
        problems = [*problems, *more]
    if not readings and not audits:
        seen = " ".join(f"{p.name}: {p.reason.rstrip('.')}." for p in problems)
        raise EquipoiseError(f"{folder} must hold a run or an audit that can be read: none can. {seen}")
    return Records(tuple(readings), audits, tuple(problems))


def _audits(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The audits of ``folder`` and right below it that are not of a run that lies there."""
    found: dict[str, dict[str, Any]] = {}
    problems = []
    places = [folder] if (folder / "audit.json").is_file() else sorted(p.parent for p in folder.glob("*/audit.json"))
    for place in places:
        if (place / "config.json").exists():
            continue
        name = place.resolve().name
        try:
            audit = read_audit(place)
            assert audit is not None
            found[name] = audit
        except EquipoiseError as error:
            problems.append(Problem(name, "damaged", str(error).replace(f"{folder}/", "")))
    return found, problems


def summed_loads(reading: Reading, most: int | None = None) -> Iterable[tuple[int, int, np.ndarray]]:
    """By at most ``most`` windows of equal length: the last step, the number of steps, load (layers, experts)."""
    rows = reading.run.rows("loads")
    num = len(reading.steps)
    window = 1 if most is None else max(1, -(-num // most))
    total, last, steps = None, 0, 0
    for row in rows:
        load = np.array(row["load"], np.int64)
        total, last, steps = (load if total is None else total + load), row["step"], steps + 1
        if steps == window:
            yield last, steps, total
            total, steps = None, 0
    if total is not None:
        yield last, steps, total


def _keys(of: Reading | Experts) -> dict[str, Any]:
    return {"run": of.name, "strategy": of.strategy, "seed": of.seed}


def _same(of: Reading | Experts, num: int) -> dict[str, Any]:
    return {name: pa.repeat(pa.scalar(value, KEYS.field(name).type), num) for name, value in _keys(of).items()}


def _stacked(parts: Sequence[Mapping[str, Any]], figures: Sequence[tuple[str, pa.DataType]]) -> pa.Table:
    schema = pa.schema([*KEYS, *figures])
    tables = [pa.table(dict(part), schema=schema) for part in parts]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _numbers(row: Mapping[str, Any]) -> list[str]:
    return [k for k, v in row.items() if (isinstance(v, int | float) and not isinstance(v, bool)) or v is None]


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
