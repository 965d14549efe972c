"""readings -> curves and heat maps, as plotly figures without colours of a theme: page.js adds those, light or dark."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from equipoise.report.reading import Reading

__all__ = ["CAP", "curve", "heat_map", "layer_labels", "relative_load", "strategy_styles"]

CAP = 4.0  # relative load at and above which the colour stays the same, on every page
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
GREY = "#808080"
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS = 400


def strategy_styles(strategies: Sequence[str]) -> dict[str, dict[str, str]]:
    """A fixed colour (and beyond seven a dash) for each strategy, by order; ``none`` is grey."""
    others = [strategy for strategy in strategies if strategy != "none"]
    styles = {"none": {"color": GREY, "dash": "solid"}} if "none" in strategies else {}
    for i, strategy in enumerate(others):
        styles[strategy] = {"color": OKABE_ITO[i % 7], "dash": DASHES[i // 7 % 4]}
    return styles


def plain(text: str) -> str:
    """Text for plotly, which reads a small HTML in its strings."""
    return html.escape(text, quote=False)


def _figure(figure: go.Figure) -> dict[str, Any]:
    found = figure.to_plotly_json()
    found["layout"].pop("template", None)
    return found


def curve(readings: Sequence[Reading], key: str, *, title: str, log: bool) -> tuple[dict[str, Any], int]:
    """One line a run of ``key`` over steps, and the number of steps that one point is the mean of (1: no smoothing)."""
    strategies = list(dict.fromkeys(reading.strategy for reading in readings))
    styles = strategy_styles(strategies)
    several = len(readings) > len(strategies)
    longest = max((len(reading.steps) for reading in readings), default=0)
    window = max(1, math.ceil(longest / MOST_POINTS))
    figure = go.Figure()
    for reading in readings:
        x, y = _points(reading.steps, key, window, positive=log)
        name = reading.strategy + (f", seed {reading.seed}" if several else "")
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            name=plain(name + ("" if reading.result else " (not finished)")),
            meta={"strategy": strategies.index(reading.strategy)},
            line={"width": 1.1 if several else 2, **styles[reading.strategy]},
            hovertemplate="%{y:.3f}",
        )
    figure.update_layout(
        height=340,
        margin={"l": 52, "r": 12, "t": 34, "b": 44},
        showlegend=False,
        hovermode="x unified",
        title={"text": title, "x": 0, "xref": "container", "xanchor": "left", "y": 0.97, "font": {"size": 14}},
        xaxis={
            "title": {"text": "step", "standoff": 8, "font": {"size": 12}},
            "zeroline": False,
            "unifiedhovertitle": {"text": "step %{x}"},
        },
        yaxis={"type": "log" if log else "linear", "zeroline": False, "nticks": 8, "tickformat": "~g"},
    )
    if log:
        figure.update_yaxes(dtick="D2", minor={"showgrid": False})
    return _figure(figure), window


def _points(rows: Sequence[Mapping[str, Any]], key: str, window: int, positive: bool) -> tuple[list, list]:
    x, y = [], []
    for start in range(0, len(rows), window):
        part = rows[start : start + window]
        values = [row[key] for row in part if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
        mean = math.fsum(values) / len(values) if values else None
        x.append(part[-1]["step"])
        y.append(None if mean is None or (positive and mean <= 0) else float(f"{mean:.5g}"))
    return x, y


def relative_load(load: Sequence[int]) -> list[float | None]:
    """Load of each expert over the mean load, ``E c_e / sum(c)``: 1 everywhere when even; None without assignments.

    >>> relative_load([6, 1, 1, 0])
    [3.0, 0.5, 0.5, 0.0]
    """
    total = sum(load)
    return [count * len(load) / total if total else None for count in load]


def heat_map(reading: Reading) -> dict[str, Any]:
    """A figure of domain x expert for the last layer, and under ``layers`` what to put into it for each layer.

    Experts are sorted within a layer: by the domain that uses them most, then by how much it does.
    """
    assert reading.evaluation is not None
    found = reading.evaluation["domains"]
    domains = [domain for domain in reading.config["domains"] if domain in found]
    domains += [domain for domain in found if domain not in domains]
    layers = []
    for i in range(len(reading.config["layers"])):
        z = [relative_load(found[domain]["load"][i]) for domain in domains]
        by_expert = [[value or 0.0 for value in column] for column in zip(*z, strict=True)]
        order = sorted(range(len(by_expert)), key=lambda e: (_arg_max(by_expert[e]), -max(by_expert[e]), e))
        shown = [[None if (value := row[e]) is None else round(value, 2) for e in order] for row in z]
        layers.append({"experts": [str(e) for e in order], "z": shown})
    figure = go.Figure(
        go.Heatmap(
            y=list(range(len(domains))),
            xgap=1,
            ygap=1,
            coloraxis="coloraxis",
            customdata=[[plain(domain)] * len(by_expert) for domain in domains],
            hovertemplate="%{customdata}, expert %{x}: %{z:.2f} × even<extra></extra>",
        )
    )
    figure.update_layout(
        height=56 + 21 * len(domains),
        margin={"l": 92, "r": 6, "t": 6, "b": 30},
        coloraxis={"cmin": 0, "cmax": CAP, "showscale": False},
        xaxis={
            "type": "category",
            "showticklabels": False,
            "ticks": "",
            "showgrid": False,
            "fixedrange": True,
            "title": {"text": "experts, sorted", "standoff": 4, "font": {"size": 12}},
        },
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "fixedrange": True,
            "tickmode": "array",
            "tickvals": list(range(len(domains))),
            "ticktext": [plain(_short(domain, 13)) for domain in domains],
        },
    )
    return {**_figure(figure), "layers": layers}


def _arg_max(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def layer_labels(names: Sequence[str]) -> list[str]:
    """The first number in each module name where that tells the layers apart, else the whole name.

    >>> layer_labels(["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"])
    ['1', '2']
    """
    numbers = [match.group() if (match := re.search(r"\d+", name)) else "" for name in names]
    return numbers if all(numbers) and len(set(numbers)) == len(numbers) else list(names)
