"""The data from which the scripts of a page draw, in compressed form."""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from equipoise_lab.analysis.figures import layer_labels
from equipoise_lab.analysis.reader import Experts, RecordedRun
from equipoise_lab.analysis.tables import summed_loads
from equipoise_lab.records import finite

__all__ = ["figure_data", "loads_over_time", "model_data", "pack", "packed", "table_data", "unpack"]

MAX_TIME_CELLS = 1_200_000  # load over time: times x layers x experts, all runs together
MAX_TIMES = 120  # load over time: points in time per run
MAX_TYPICAL_TOKENS = 80_000  # per page, all models together
MAX_MAP_CELLS = 1_500_000  # maps of evaluations: evaluations x layers x domains x experts, all models together
MAX_MAPS = 24  # evaluations per model
LOAD_UNIT = 0.02  # load over time: relative load is rounded to multiples of this


def pack(text: str) -> str:
    """Compressed with gzip and encoded as base64."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def unpack(text: str) -> str:
    return gzip.decompress(base64.b64decode(text)).decode()


def packed(**values: Any) -> Markup:
    text = json.dumps(finite(values), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(pack(text))


def figure_data(figure: go.Figure) -> Any:
    data = json.loads(figure.to_json())
    data["layout"].pop("template", None)
    return data


def table_data(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": names, "rows": [[row.get(name) for name in names] for row in rows]}


def model_data(model: Experts, num_models: int, run: RecordedRun | None = None) -> dict[str, Any]:
    """The data of the heat maps and of the table of experts. ``run`` is the run of the model, None for an audit."""
    num_experts = sum(load.shape[1] for load in model.load)
    tokens_per_expert = max(3, min(10, MAX_TYPICAL_TOKENS // max(1, num_experts * num_models)))
    return {
        "strategy": model.strategy,
        "seed": model.seed,
        "layers": layer_labels(model.layers),
        "domains": model.domains,
        "k": model.k,
        "maps": _maps(model, num_models, run),
        "typical": [
            [
                [[token["text"], round(token["share"], 3), token["count"]] for token in expert[:tokens_per_expert]]
                for expert in layer
            ]
            for layer in model.typical
        ],
        "partners": [[row[:3] for row in layer] for layer in model.partners],
    }


def _maps(model: Experts, num_models: int, run: RecordedRun | None) -> list[dict[str, Any]]:
    """Loads by layer, domain and expert of evaluations over training, at most ``MAX_MAPS`` of them, the last one too.

    Of an audit there is one, without a step.
    """
    last = [load.tolist() for load in model.load]
    if run is None:
        return [{"step": None, "split": None, "load": last}]
    cells = sum(load.size for load in model.load)
    most = max(1, min(MAX_MAPS, MAX_MAP_CELLS // max(1, cells * num_models)))
    steps = [row["step"] for row in run.evaluations()]
    shown = {steps[round(i)] for i in np.linspace(len(steps) - 1, 0, min(most, len(steps)))}
    return [
        {"step": row["step"], "split": row.get("split", "test"), "load": [load.tolist() for load in run.load_of(row)]}
        for row in run.evaluations()
        if row["step"] in shown
    ]


def loads_over_time(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """Relative load over time of each run, one byte per cell in units of ``LOAD_UNIT``."""
    cells_per_time = sum(len(run.config["layers"]) * run.config["num_experts"] for run in runs)
    num_times = max(10, min(MAX_TIMES, MAX_TIME_CELLS // max(1, cells_per_time)))
    times = []
    for run in runs:
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
