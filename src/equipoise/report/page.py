"""readings, summary, figures -> one self-contained ``report.html``.

No network and no clock: the same runs give the same bytes.
"""

import json
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from equipoise.records import finite
from equipoise.report.figures import CAP, curve, heat_map, layer_labels, strategy_styles
from equipoise.report.reading import Reading, read_runs
from equipoise.report.summary import COLUMNS, findings, mean_and_sd, number, summary_rows, unequal_terms

__all__ = ["write_report"]


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into ``folder`` from the run folders below it, and returns its path.

    The page holds everything it needs and opens from the disk without a network. Runs that are not finished or damaged
    are named on it and the others are drawn; if none has an evaluation, this is an ``EquipoiseError`` and no page is
    written. An old page is replaced in one move.
    """
    readings, problems = read_runs(folder)
    path = Path(folder) / "report.html"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_file("page.html.jinja")).render(**_page(readings), problems=problems)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, path)
    return path


def _file(name: str) -> str:
    return files("equipoise.report").joinpath(name).read_text(encoding="utf-8")


def _page(readings: Sequence[Reading]) -> dict[str, Any]:
    strategies = list(dict.fromkeys(reading.strategy for reading in readings))
    runs = [reading.run for reading in readings]
    config = readings[0].config
    maxvio, window = curve(readings, "maxvio_batch", title="MaxVio of each training step (log scale)", log=True)
    loss, _ = curve(readings, "loss", title="Training loss, nats a token", log=False)
    shown = _one_a_strategy(readings)
    heat_maps = [heat_map(reading) for reading in shown]
    data = {"cap": CAP, "curves": [maxvio, loss], "heat": heat_maps}
    return {
        "plotly": Markup(get_plotlyjs()),
        "style": Markup(_file("page.css")),
        "script": Markup(_file("page.js")),
        "data": Markup(embed(data)),
        "strategies": strategies,
        "styles": strategy_styles(strategies),
        "config": config,
        "num_seeds": len({reading.seed for reading in readings}),
        "findings": findings(runs),
        "unequal": unequal_terms([reading.config for reading in readings]),
        "notes": _notes(readings),
        "columns": COLUMNS,
        "rows": summary_rows(runs),
        "domain_rows": _domain_rows(readings),
        "domains": config["domains"],
        "window": window,
        "shown": shown,
        "layers": layer_labels(config["layers"]),
        "readings": readings,
        "cap": CAP,
        "count": count,
        "number": number,
        "breakable": breakable,
        "pretty": lambda value: json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True),
    }


def embed(value: Any) -> str:
    """JSON that can stand inside ``<script>``: no ``<`` and nothing that is not a finite number."""
    return json.dumps(finite(value), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def breakable(name: str) -> Markup:
    """A strategy's name that may break after its separators, not within a word."""
    return Markup("<wbr>").join(re.findall(r"[^:,+]*[:,+]?", name)[:-1])


def count(value: Any) -> str:
    """A large number for reading: 13,107,200 is ``13.1 M``."""
    if not isinstance(value, int | float):
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _notes(readings: Sequence[Reading]) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for reading in readings:
        for note in reading.config.get("notes", []):
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
