"""The self-contained page ``report.html``, from records, figures and findings.

The page depends only on the records, so the same records give the same bytes. It contains plotly and the data in
compressed form; the browser decompresses them.
"""

import base64
import gzip
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis import figures
from equipoise_lab.analysis.figures import CAP, layer_labels, strategy_styles
from equipoise_lab.analysis.reader import Experts, RecordedRun
from equipoise_lab.analysis.summary import COLUMNS, mean_and_sd, number, summary_rows, unequal_terms
from equipoise_lab.analysis.tables import Records, read_records, summed_loads
from equipoise_lab.records import Config, finite
from equipoise_lab.report.findings import compare_runs

__all__ = ["write_report"]

TEMPLATES = ("page.html.jinja", "runs.html.jinja", "audit.html.jinja")
MAX_TIME_CELLS = 1_200_000  # load over time: times x layers x experts, all runs together
MAX_TIMES = 120  # load over time: points in time per run
MAX_TYPICAL_TOKENS = 80_000  # per page, all models together
LOAD_UNIT = 0.02  # load over time: relative load is rounded to multiples of this


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into ``folder``, from the runs below it or from the audit in it. Returns the path.

    The page is self-contained and needs no network. It names damaged and unfinished runs and draws what they allow.
    Raises ``EquipoiseError`` and writes nothing if no run has an evaluation. An old page is replaced atomically.
    """
    records = read_records(folder)
    if records.recorded_runs:
        if not any(run.evaluation for run in records.recorded_runs):
            reasons = "; ".join(f"{p.name}: {p.reason}" for p in records.problems) or "runs without an evaluation"
            raise EquipoiseError(
                f"A report needs at least one run with an evaluation: {folder} contains {reasons}. Write the report "
                "again after the first evaluation of a run."
            )
        template, values = "runs.html.jinja", _run_page_values(records)
    else:
        if len(records.audits) > 1:
            raise EquipoiseError(
                f"A report shows one audit: {folder} contains {', '.join(records.audits)}. Pass the folder of one of "
                "them."
            )
        template, values = "audit.html.jinja", _audit_page_values(records)
    loader = DictLoader({name: _read_file(name) for name in TEMPLATES})
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(template).render(
        plotly=_plotly(),
        style=Markup(_read_file("page.css")),
        script=Markup(_read_file("page.js")),
        columns=COLUMNS,
        cap=CAP,
        abbreviate=abbreviate,
        number=number,
        breakable=breakable,
        pretty=lambda value: json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True),
        problems=records.problems,
        **values,
    )
    path = Path(folder) / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return path


def _read_file(name: str) -> str:
    return files("equipoise_lab.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> Markup:
    return Markup(pack(get_plotlyjs()))


def pack(text: str) -> str:
    """Compressed with gzip and encoded as base64."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def unpack(text: str) -> str:
    return gzip.decompress(base64.b64decode(text)).decode()


def _packed_data(**values: Any) -> Markup:
    text = json.dumps(finite(values), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(pack(text))


def _figure_data(figure: go.Figure) -> Any:
    data = json.loads(figure.to_json())
    data["layout"].pop("template", None)
    return data


def _run_page_values(records: Records) -> dict[str, Any]:
    recorded_runs = records.recorded_runs
    strategies = list(dict.fromkeys(run.strategy for run in recorded_runs))
    styles = strategy_styles(strategies)
    run_files = [run.files for run in recorded_runs]
    steps, table = records.steps(), records.runs()
    drawn_runs = _one_run_per_strategy(recorded_runs)
    models = [model for run in drawn_runs if (model := run.experts) is not None]
    experts = Records(tuple(drawn_runs), {}, ()).experts()
    curves = {
        "loss": figures.curve(steps, "loss", title="Training loss, nats per token"),
        "maxvio": figures.curve(steps, "maxvio_batch", title="MaxVio of each training step (log scale)", log=True),
    }
    if "bias_max" in steps.column_names:
        curves["bias"] = figures.curve(steps, "bias_max", title="Largest expert bias, absolute value")
        if not curves["bias"].data:
            del curves["bias"]
    unfinished = {run.name for run in recorded_runs if run.result is None}
    for figure in curves.values():
        for trace in figure.data:
            trace.name += " (not finished)" if trace.meta["run"] in unfinished else ""
    times = _loads_over_time(drawn_runs)
    figure_data = {name: _figure_data(figure) for name, figure in curves.items()}
    is_paired = False
    if len(strategies) > 1 and any(run.result is not None for run in recorded_runs):
        quality = figures.quality_against_balance(table)
        figure_data["outcome"], is_paired = _figure_data(quality), quality.layout.meta["paired"]
    rank_loads = figures.rank_loads(experts)
    costs = rank_loads.to_pylist()
    if costs:
        figure_data["cost"] = _figure_data(figures.cost(rank_loads))
    config: dict[str, Any] = dict.fromkeys(Config.__annotations__) | recorded_runs[0].config  # a page shows None as "?"
    return {
        "data": _packed_data(
            cap=CAP,
            figures=figure_data,
            models=[_model_data(model, len(models)) for model in models],
            times=times,
            colors=[styles[model.strategy]["color"] for model in models],
            table=_table_data(table.drop_columns(["config"]).to_pylist()),
        ),
        "strategies": strategies,
        "styles": styles,
        "config": config,
        "num_seeds": len({run.seed for run in recorded_runs}),
        "findings": compare_runs(run_files),
        "is_paired": is_paired,
        "curves": list(curves),
        "window": curves["loss"].layout.meta["window"],
        "differing_settings": unequal_terms([run.config for run in recorded_runs]),
        "notes": _seeds_by_note(recorded_runs),
        "rows": summary_rows(run_files),
        "domain_rows": _domain_rows(recorded_runs),
        "domains": config["domains"],
        "drawn_runs": drawn_runs,
        "layers": layer_labels(config["layers"]),
        "has_tokens": any(any(layer) for model in models for layer in model.typical),
        "has_times": bool(times),
        "costs": _costs_by_strategy(costs),
        "recorded_runs": recorded_runs,
    }


def _audit_page_values(records: Records) -> dict[str, Any]:
    [(name, audit)] = records.audits.items()
    [model] = records.models
    experts, layers = records.experts(), audit["layers"]
    rank_loads = figures.rank_loads(experts)
    costs = rank_loads.to_pylist()
    figure_data = {"layers": _figure_data(figures.layers(layers))}
    if costs:
        figure_data["cost"] = _figure_data(figures.cost(rank_loads))
    styles = strategy_styles([model.strategy])
    return {
        "data": _packed_data(
            cap=CAP,
            figures=figure_data,
            models=[_model_data(model, 1)],
            times=[],
            colors=[styles[model.strategy]["color"]],
            table=_table_data([_single_numbers(layer) for layer in layers]),
        ),
        "name": name,
        "audit": audit,
        "styles": styles,
        "layers": layer_labels(model.layers),
        "model": model,
        "domains": model.domains,
        "num_tokens": sum(audit["tokens"].values()),
        "has_tokens": any(any(layer) for layer in model.typical),
        "costs": _costs_by_strategy(costs),
    }


def _single_numbers(layer: dict[str, Any]) -> dict[str, Any]:
    """The entries of an audited layer that fit into one cell of a table."""
    numbers = {key: value for key, value in layer.items() if isinstance(value, int | float | str)}
    for key in ("domain_information_bits", "domain_distance"):
        numbers |= {key: layer[key]["value"], f"{key}_bound": layer[key]["bound"]}
    return numbers


def _model_data(model: Experts, num_models: int) -> dict[str, Any]:
    """The data from which page.js draws the heat maps and the table of experts."""
    num_experts = sum(load.shape[1] for load in model.load)
    tokens_per_expert = max(3, min(10, MAX_TYPICAL_TOKENS // max(1, num_experts * num_models)))
    return {
        "strategy": model.strategy,
        "seed": model.seed,
        "layers": layer_labels(model.layers),
        "domains": model.domains,
        "k": model.k,
        "load": [load.tolist() for load in model.load],
        "typical": [
            [
                [[token["text"], round(token["share"], 3), token["count"]] for token in expert[:tokens_per_expert]]
                for expert in layer
            ]
            for layer in model.typical
        ],
        "partners": [[row[:3] for row in layer] for layer in model.partners],
    }


def _loads_over_time(drawn_runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """Relative load over time of each run, one byte per cell in units of ``LOAD_UNIT``."""
    cells_per_time = sum(len(run.config["layers"]) * run.config["num_experts"] for run in drawn_runs)
    num_times = max(10, min(MAX_TIMES, MAX_TIME_CELLS // max(1, cells_per_time)))
    times = []
    for run in drawn_runs:
        sums = list(summed_loads(run, num_times))
        if not sums:
            continue
        load = np.stack([load for _, _, load in sums]).astype(float)  # times, layers, experts
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.nan_to_num(load / load.mean(-1, keepdims=True))
        cells = np.clip(np.rint(relative / LOAD_UNIT), 0, 255).astype(np.uint8)
        times.append(
            {
                "strategy": run.strategy,
                "seed": run.seed,
                "layers": layer_labels(run.config["layers"]),
                "steps": [last for last, _, _ in sums],
                "shape": list(load.shape),
                "unit": LOAD_UNIT,
                "cells": base64.b64encode(cells.tobytes()).decode(),
            }
        )
    return times


def _table_data(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": names, "rows": [[row.get(name) for name in names] for row in rows]}


def _costs_by_strategy(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of costs: ``sizes`` (numbers of ranks), and by strategy and size (mean over layers, worst layer)."""
    sizes = sorted({row["ranks"] for row in costs})
    rows: dict[str, dict[int, tuple[float, float]]] = {}
    for row in costs:
        rows.setdefault(row["strategy"], {})[row["ranks"]] = (row["mean"], row["worst"])
    return {"sizes": sizes, "rows": rows}


def breakable(name: str) -> Markup:
    """A strategy's name that may wrap after its separators, but not within a word."""
    return Markup("<wbr>").join(re.findall(r"[^:,+/]*[:,+/]?", name)[:-1])


def abbreviate(value: Any) -> str:
    """A large number in three digits: 13,107,200 is ``13.1 M``. "?" if it is not a number."""
    if not isinstance(value, int | float):
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # three digits round it up to this unit
            return f"{value / size:.3g} {unit}"
    return str(value)


def _seeds_by_note(recorded_runs: Sequence[RecordedRun]) -> dict[tuple[str, str], list[int]]:
    """By strategy and text of a note or alert: the seeds that have it."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in recorded_runs:
        alerts = [f"step {row['step']}: {alert}" for row in run.steps for alert in row.get("alerts") or []]
        for note in [*run.config.get("notes", []), *alerts]:
            seeds.setdefault((run.strategy, str(note)), []).append(run.seed)
    return seeds


def _one_run_per_strategy(recorded_runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The runs from which experts are drawn: finished ones first, then the lowest seed.

    Experts of different seeds do not correspond, so they are never averaged.
    """
    by_strategy: dict[str, RecordedRun] = {}
    for run in sorted(recorded_runs, key=lambda run: (run.result is None, run.seed)):
        if run.evaluation is not None:
            by_strategy.setdefault(run.strategy, run)
    order = list(dict.fromkeys(run.strategy for run in recorded_runs))
    return sorted(by_strategy.values(), key=lambda run: order.index(run.strategy))


def _domain_rows(recorded_runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """The table of losses by domain, one row per strategy."""
    losses: dict[str, list[dict[str, Any]]] = {}  # by strategy: one {domain: losses} per seed
    for run in recorded_runs:
        if run.result is not None:
            losses.setdefault(run.strategy, []).append(run.result["domains"])
    rows = []
    for strategy, by_seed in losses.items():
        cells = {}
        for domain in dict.fromkeys(domain for by_domain in by_seed for domain in by_domain):
            mean, sd = mean_and_sd([by_domain.get(domain, {}).get("nats") for by_domain in by_seed])
            cells[domain] = number(mean, 3) + ("" if sd is None else f" ± {number(sd, 3)}")
        rows.append({"strategy": strategy, "cells": cells})
    return rows
