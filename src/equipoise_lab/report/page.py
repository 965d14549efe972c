"""records, figures, words -> one self-contained ``report.html``.

No network and no clock: the same records give the same bytes. plotly and the data are compressed inside the page, which
the browser undoes.
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
from equipoise_lab.analysis.reading import Experts, Reading
from equipoise_lab.analysis.summary import COLUMNS, mean_and_sd, number, summary_rows, unequal_terms
from equipoise_lab.analysis.tables import Records, read_records, summed_loads
from equipoise_lab.records import finite
from equipoise_lab.report.words import outcome

__all__ = ["write_report"]

TEMPLATES = ("page.html.jinja", "runs.html.jinja", "audit.html.jinja")
MOST_CELLS = 1_200_000  # of load over time, all runs together
MOST_TIMES = 120
MOST_TOKENS = 80_000  # typical tokens in a page, all models together
STEPS_OF_LOAD = 0.02  # load over time is rounded to this, relative to even


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into ``folder`` from the runs below it, or from the audit that it holds; returns its path.

    The page holds everything it needs and opens from the disk without a network. Runs that are not finished or damaged
    are named on it and the others are drawn; if none has an evaluation, this is an ``EquipoiseError`` and no page is
    written. An old page is replaced in one move.
    """
    records = read_records(folder)
    if records.readings:
        if not any(reading.evaluation for reading in records.readings):
            seen = "; ".join(f"{p.name}: {p.reason}" for p in records.problems) or "runs without one"
            raise EquipoiseError(
                f"A report needs one run with an evaluation: {folder} holds {seen}. Let a run reach its first "
                "evaluation, then write the report again."
            )
        template, values = "runs.html.jinja", _of_runs(records)
    else:
        if len(records.audits) > 1:
            raise EquipoiseError(
                f"A report is of one audit: {folder} holds {', '.join(records.audits)}. Give the folder of one of them."
            )
        template, values = "audit.html.jinja", _of_audit(records)
    loader = DictLoader({name: _file(name) for name in TEMPLATES})
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(template).render(
        plotly=_plotly(),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        columns=COLUMNS,
        cap=CAP,
        count=count,
        number=number,
        breakable=breakable,
        pretty=lambda value: json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True),
        problems=records.problems,
        **values,
    )
    path = Path(folder) / "report.html"
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, path)
    return path


def _file(name: str) -> str:
    return files("equipoise_lab.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> Markup:
    return Markup(packed(get_plotlyjs()))


def packed(text: str) -> str:
    """``text``, compressed, in the letters of base64."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def unpacked(text: str) -> str:
    return gzip.decompress(base64.b64decode(text)).decode()


def _data(**values: Any) -> Markup:
    text = json.dumps(finite(values), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(packed(text))


def _json(figure: go.Figure) -> Any:
    found = json.loads(figure.to_json())
    found["layout"].pop("template", None)
    return found


def _of_runs(records: Records) -> dict[str, Any]:
    readings = records.readings
    strategies = list(dict.fromkeys(reading.strategy for reading in readings))
    styles = strategy_styles(strategies)
    runs = [reading.run for reading in readings]
    said = outcome(runs)
    steps, table = records.steps(), records.runs()
    shown = _one_a_strategy(readings)
    models = [reading.experts for reading in shown]
    known = [model for model in models if model is not None]
    experts = Records(tuple(shown), {}, ()).experts()
    curves = {
        "loss": figures.curve(steps, "loss", title="Training loss, nats a token"),
        "maxvio": figures.curve(steps, "maxvio_batch", title="MaxVio of each training step (log scale)", log=True),
    }
    if "bias_max" in steps.column_names:
        curves["bias"] = figures.curve(steps, "bias_max", title="Largest bias")
        if not curves["bias"].data:
            del curves["bias"]
    unfinished = {reading.name for reading in readings if reading.result is None}
    for figure in curves.values():
        for trace in figure.data:
            trace.name += " (not finished)" if trace.meta["run"] in unfinished else ""
    times = _over_time(shown)
    drawn = {name: _json(figure) for name, figure in curves.items()}
    paired = False
    if len(strategies) > 1 and any(reading.result is not None for reading in readings):
        compared = figures.quality_against_balance(table)
        drawn["outcome"], paired = _json(compared), compared.layout.meta["paired"]
    ranks = figures.rank_loads(experts)
    costs = ranks.to_pylist()
    if costs:
        drawn["cost"] = _json(figures.cost(ranks))
    config = readings[0].config
    return {
        "data": _data(
            cap=CAP,
            figures=drawn,
            models=[_model(model, len(known)) for model in known],
            times=times,
            colors=[styles[model.strategy]["color"] for model in known],
            table=_rows(table.drop_columns(["config"]).to_pylist()),
        ),
        "strategies": strategies,
        "styles": styles,
        "config": config,
        "num_seeds": len({reading.seed for reading in readings}),
        "outcome": said,
        "paired": paired,
        "curves": list(curves),
        "window": curves["loss"].layout.meta["window"],
        "unequal": unequal_terms([reading.config for reading in readings]),
        "notes": _notes(readings),
        "rows": summary_rows(runs),
        "domain_rows": _domain_rows(readings),
        "domains": config["domains"],
        "shown": shown,
        "layers": layer_labels(config["layers"]),
        "has_tokens": any(any(layer) for model in known for layer in model.typical),
        "has_times": bool(times),
        "costs": _by_strategy(costs),
        "readings": readings,
    }


def _of_audit(records: Records) -> dict[str, Any]:
    [(name, audit)] = records.audits.items()
    [model] = records.models
    experts, layers = records.experts(), audit["layers"]
    ranks = figures.rank_loads(experts)
    costs = ranks.to_pylist()
    drawn = {"layers": _json(figures.layers(layers))}
    if costs:
        drawn["cost"] = _json(figures.cost(ranks))
    styles = strategy_styles([model.strategy])
    return {
        "data": _data(
            cap=CAP,
            figures=drawn,
            models=[_model(model, 1)],
            times=[],
            colors=[styles[model.strategy]["color"]],
            table=_rows([_flat(layer) for layer in layers]),
        ),
        "name": name,
        "audit": audit,
        "styles": styles,
        "labels": layer_labels(model.layers),
        "layers": layer_labels(model.layers),
        "model": model,
        "domains": model.domains,
        "num_tokens": sum(audit["tokens"].values()),
        "has_tokens": any(any(layer) for layer in model.typical),
        "costs": _by_strategy(costs),
    }


def _flat(layer: dict[str, Any]) -> dict[str, Any]:
    """The figures of a layer that are one number."""
    numbers = {key: value for key, value in layer.items() if isinstance(value, int | float | str)}
    for key in ("domain_information_bits", "domain_distance"):
        numbers |= {key: layer[key]["value"], f"{key}_bound": layer[key]["bound"]}
    return numbers


def _model(model: Experts, num_models: int) -> dict[str, Any]:
    """What page.js draws maps and the table of experts from."""
    num_experts = sum(load.shape[1] for load in model.load)
    most = max(3, min(10, MOST_TOKENS // max(1, num_experts * num_models)))
    return {
        "strategy": model.strategy,
        "seed": model.seed,
        "layers": layer_labels(model.layers),
        "domains": model.domains,
        "k": model.k,
        "load": [load.tolist() for load in model.load],
        "typical": [
            [[[token["text"], round(token["share"], 3), token["count"]] for token in expert[:most]] for expert in layer]
            for layer in model.typical
        ],
        "partners": [[row[:3] for row in layer] for layer in model.partners],
    }


def _over_time(shown: Sequence[Reading]) -> list[dict[str, Any]]:
    """Load over time of the runs shown, relative to even, in bytes of ``STEPS_OF_LOAD``."""
    cells = sum(len(reading.config["layers"]) * reading.config["num_experts"] for reading in shown)
    most = max(10, min(MOST_TIMES, MOST_CELLS // max(1, cells)))
    found = []
    for reading in shown:
        windows = list(summed_loads(reading, most))
        if not windows:
            continue
        load = np.stack([load for _, _, load in windows]).astype(float)  # times, layers, experts
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.nan_to_num(load / load.mean(-1, keepdims=True))
        cells_of = np.clip(np.rint(relative / STEPS_OF_LOAD), 0, 255).astype(np.uint8)
        found.append(
            {
                "strategy": reading.strategy,
                "seed": reading.seed,
                "layers": layer_labels(reading.config["layers"]),
                "steps": [last for last, _, _ in windows],
                "shape": list(load.shape),
                "unit": STEPS_OF_LOAD,
                "cells": base64.b64encode(cells_of.tobytes()).decode(),
            }
        )
    return found


def _rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": names, "rows": [[row.get(name) for name in names] for row in rows]}


def _by_strategy(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of costs: the sizes, and by strategy the mean over layers and the worst layer."""
    sizes = sorted({row["ranks"] for row in costs})
    rows: dict[str, dict[int, tuple[float, float]]] = {}
    for row in costs:
        rows.setdefault(row["strategy"], {})[row["ranks"]] = (row["mean"], row["worst"])
    return {"sizes": sizes, "rows": rows}


def breakable(name: str) -> Markup:
    """A strategy's name that may break after its separators, not within a word."""
    return Markup("<wbr>").join(re.findall(r"[^:,+/]*[:,+/]?", name)[:-1])


def count(value: Any) -> str:
    """A large number for reading: 13,107,200 is ``13.1 M``."""
    if not isinstance(value, int | float):
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # what three digits round up to it
            return f"{value / size:.3g} {unit}"
    return str(value)


def _notes(readings: Sequence[Reading]) -> dict[tuple[str, str], list[int]]:
    """Notes and alerts of the runs, and the seeds that have each."""
    found: dict[tuple[str, str], list[int]] = {}
    for reading in readings:
        alerts = [f"step {row['step']}: {said}" for row in reading.steps for said in row.get("alerts") or []]
        for note in [*reading.config.get("notes", []), *alerts]:
            found.setdefault((reading.strategy, str(note)), []).append(reading.seed)
    return found


def _one_a_strategy(readings: Sequence[Reading]) -> list[Reading]:
    """The run whose experts are drawn: experts of different seeds are different, so they are never averaged."""
    found: dict[str, Reading] = {}
    for reading in sorted(readings, key=lambda reading: (reading.result is None, reading.seed)):
        if reading.evaluation is not None:
            found.setdefault(reading.strategy, reading)
    order = list(dict.fromkeys(reading.strategy for reading in readings))
    return sorted(found.values(), key=lambda reading: order.index(reading.strategy))


def _domain_rows(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    results: dict[str, list[dict[str, Any]]] = {}
    for reading in readings:
        if reading.result is not None:
            results.setdefault(reading.strategy, []).append(reading.result["domains"])
    rows = []
    for strategy, found in results.items():
        cells = {}
        for domain in dict.fromkeys(domain for result in found for domain in result):
            mean, sd = mean_and_sd([result.get(domain, {}).get("nats") for result in found])
            cells[domain] = number(mean, 3) + ("" if sd is None else f" ± {number(sd, 3)}")
        rows.append({"strategy": strategy, "cells": cells})
    return rows
