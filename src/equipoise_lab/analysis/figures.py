"""Plotly figures of the tables. Each strategy has a fixed colour. The report adds the theme, light or dark.

>>> records = read_records("runs/demo")  # doctest: +SKIP
>>> quality_against_balance(records.runs()).show()  # doctest: +SKIP
>>> curve(records.steps(), "maxvio_batch").write_image("maxvio.svg")  # needs kaleido  # doctest: +SKIP
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc

from equipoise_lab.analysis.maps import CAP, DIVERGING, expert_map, layer_labels, load_over_time, plain, relative_load
from equipoise_lab.analysis.specialisation import RANKS, rank_load
from equipoise_lab.analysis.statistics import estimate
from equipoise_lab.analysis.styles import BLUE, VERMILLION, strategy_styles

__all__ = [
    "CAP",
    "DIVERGING",
    "cost",
    "curve",
    "expert_map",
    "layer_labels",
    "layers",
    "load_over_time",
    "plain",
    "quality_against_balance",
    "rank_loads",
    "relative_load",
]

LEAST_SPAN = 0.04  # of an axis of losses, relative to the loss: seeds alone differ by about a quarter of it
MAX_POINTS = 400  # per line


def quality_against_balance(
    runs: pa.Table, *, quality: str = "val_nats", balance: str = "maxvio_global", level: float = 0.95
) -> go.Figure:
    """Quality against balance: a large mark per strategy (mean over seeds, t intervals), a small mark per run.

    The lower left is best. Unfinished and diverged runs are left out. The axes have a least span, so that a difference
    within the noise of seeds does not look large: ``LEAST_SPAN`` of the loss, and a MaxVio of 0.5.

    If the strategies share at least two seeds, only shared seeds are drawn, and the effect of the seed is removed, as
    pairing does: each value loses its seed's mean over strategies and gains the mean over all seeds. This also removes
    a part of the true spread, so intervals are widened by ``sqrt(S / (S - 1))`` for S strategies.
    ``figure.layout.meta["paired"]`` is true in this case. Source: Cousineau 2005, Tutorials in Quantitative Methods for
    Psychology 1, 42-45; Morey 2008, same journal 4, 61-64.
    """
    styles = strategy_styles(runs["strategy"].to_pylist())
    values: dict[str, dict[int, np.ndarray]] = {}  # by strategy and seed: (balance, quality)
    for row in runs.select(["strategy", "seed", balance, quality]).to_pylist():
        if row[balance] is not None and row[quality] is not None:
            values.setdefault(row["strategy"], {})[row["seed"]] = np.array([row[balance], row[quality]])
    values, widen = _without_seed_effects(values)
    figure = go.Figure()
    ends: list[float] = []  # of everything drawn, along the axis of quality
    for strategy, by_seed in values.items():
        x, y = np.stack(list(by_seed.values())).T
        x_mean, y_mean = estimate(x.tolist(), level=level), estimate(y.tolist(), level=level)
        half_widths = [widen * (e.interval[1] - e.mean) if e.n > 1 else 0.0 for e in (x_mean, y_mean)]
        ends += [*y.tolist(), y_mean.mean - half_widths[1], y_mean.mean + half_widths[1]]
        color = styles[strategy]["color"]
        mark = {"color": color, "symbol": styles[strategy]["symbol"]}
        if len(by_seed) > 1:
            figure.add_scatter(
                x=x.tolist(),
                y=y.tolist(),
                mode="markers",
                marker={**mark, "size": 5, "opacity": 0.45},
                name=plain(strategy),
                legendgroup=strategy,
                showlegend=False,
                customdata=list(by_seed),
                hovertemplate="seed %{customdata}: MaxVio %{x:.3f}, %{y:.4f} nats<extra>%{fullData.name}</extra>",
            )
        figure.add_scatter(
            x=[x_mean.mean],
            y=[y_mean.mean],
            mode="markers",
            marker={**mark, "size": 13},
            name=plain(strategy),
            legendgroup=strategy,
            error_x=_error_bar(half_widths[0], color, len(by_seed) > 1)
            | {"arrayminus": [min(half_widths[0], max(x_mean.mean, 0.0))]},  # MaxVio is never below 0
            error_y=_error_bar(half_widths[1], color, len(by_seed) > 1),
            hovertemplate="MaxVio %{x:.3f}, %{y:.4f} nats<extra>%{fullData.name}</extra>",
        )
    _set_outcome_axes(figure, ends)
    return figure.update_layout(meta={"paired": widen > 1})


def _set_outcome_axes(figure: go.Figure, losses: Sequence[float]) -> None:
    """``losses``: those that must be seen."""
    figure.update_layout(
        height=400,
        margin={"l": 58, "r": 12, "t": 12, "b": 48},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hovermode="closest",
        xaxis={
            "title": {"text": "MaxVio on test text (0 is even) →", "standoff": 8},
            "zeroline": False,
            "rangemode": "tozero",
            "autorangeoptions": {"include": [0, 0.5]},
        },
        yaxis={
            "title": {"text": "loss, nats per token", "standoff": 8},
            "zeroline": False,
            "nticks": 6,
            "autorangeoptions": {"include": _span(losses)},
        },
    )


def _without_seed_effects(
    values: Mapping[str, Mapping[int, np.ndarray]],
) -> tuple[dict[str, dict[int, np.ndarray]], float]:
    """Values on shared seeds without the effect of the seed, and the factor by which to widen intervals.

    If fewer than two seeds are shared, the values are unchanged and the factor is 1.
    """
    seeds = set.intersection(*map(set, values.values())) if values else set()
    if len(values) < 2 or len(seeds) < 2:
        return {strategy: dict(by_seed) for strategy, by_seed in values.items()}, 1.0
    seed_means = {seed: np.mean([by_seed[seed] for by_seed in values.values()], axis=0) for seed in seeds}
    grand_mean = np.mean(list(seed_means.values()), axis=0)
    centred = {
        strategy: {seed: by_seed[seed] - seed_means[seed] + grand_mean for seed in sorted(seeds)}
        for strategy, by_seed in values.items()
    }
    return centred, math.sqrt(len(values) / (len(values) - 1))


def _span(losses: Sequence[float]) -> list[float]:
    """The ends of ``losses``, at least ``LEAST_SPAN`` apart."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return []
    middle = (min(finite) + max(finite)) / 2
    half = max(max(finite) - min(finite), LEAST_SPAN * abs(middle)) / 2
    return [middle - half, middle + half]


def _error_bar(half_width: float, color: str, visible: bool) -> dict[str, Any]:
    return {"type": "data", "array": [half_width], "visible": visible, "color": color, "thickness": 1.3, "width": 4}


def curve(steps: pa.Table, key: str, *, title: str = "", log: bool = False, most: int = MAX_POINTS) -> go.Figure:
    """Column ``key`` over steps, one line per run.

    Runs of more than ``most`` steps are drawn as means over equal numbers of steps. ``figure.layout.meta["window"]`` is
    that number (1: every step is a point). The axis has a least span: a factor of ten with ``log``, ``LEAST_SPAN`` of a
    loss, and from 0 otherwise.
    """
    if key not in steps.column_names or not pa.types.is_floating(steps[key].type):
        numeric = [f.name for f in steps.schema if pa.types.is_floating(f.type)]
        raise ValueError(f"key must be a numeric column of the table: got {key!r}. Use one of {', '.join(numeric)}.")
    runs = pc.unique(steps["run"]).to_pylist()
    strategies = pc.unique(steps["strategy"]).to_pylist()
    styles = strategy_styles(strategies)
    by_run = {run: steps.filter(pc.equal(steps["run"], run)) for run in runs}
    window = max(1, math.ceil(max((rows.num_rows for rows in by_run.values()), default=0) / most))
    figure = go.Figure()
    for run, rows in by_run.items():
        strategy, seed = rows["strategy"][0].as_py(), rows["seed"][0].as_py()
        x, y = _points(rows["step"].to_numpy(), rows[key].to_numpy().astype(float), window, positive=log)
        if all(value is None for value in y):
            continue
        style = styles[strategy]
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            name=plain(strategy + (f", seed {seed}" if len(runs) > len(strategies) else "")),
            meta={"strategy": strategies.index(strategy), "run": run},
            line={"width": 1.3 if len(runs) > len(strategies) else 2, "color": style["color"], "dash": style["dash"]},
            hovertemplate="%{y:.3f}",
        )
    figure.update_layout(
        height=320,
        margin={"l": 52, "r": 12, "t": 34, "b": 44},
        showlegend=False,
        hovermode="x unified",
        title={"text": title, "x": 0, "xref": "container", "xanchor": "left", "y": 0.97, "font": {"size": 14}},
        xaxis={
            "title": {"text": "step", "standoff": 8, "font": {"size": 12}},
            "zeroline": False,
            "unifiedhovertitle": {"text": "step %{x}"},
        },
        yaxis={
            "type": "log" if log else "linear",
            "zeroline": False,
            "nticks": 8,
            "tickformat": "~g",
            "autorangeoptions": {"include": _least_range(figure, key, log)},
        },
        meta={"window": window},
    )
    if log:
        figure.update_yaxes(dtick="D2", minor={"showgrid": False})
    return figure


def _least_range(figure: go.Figure, key: str, log: bool) -> list[float]:
    values = [value for trace in figure.data for value in trace.y if value is not None]
    if not values:
        return []
    if log:
        middle, factor = math.sqrt(min(values) * max(values)), max(math.sqrt(10), math.sqrt(max(values) / min(values)))
        return [middle / factor, middle * factor]
    return _span(values) if key.endswith(("loss", "nats")) else [0.0, *_span(values)]


def _points(steps: np.ndarray, values: np.ndarray, window: int, positive: bool) -> tuple[list, list]:
    """The last step and the mean of the finite values of each window. ``positive`` drops means that a log axis cannot
    show."""
    x, y = [], []
    for start in range(0, len(steps), window):
        part = values[start : start + window]
        part = part[np.isfinite(part)]
        mean = float(part.mean()) if len(part) else None
        x.append(int(steps[start : start + window][-1]))
        y.append(None if mean is None or (positive and mean <= 0) else float(f"{mean:.5g}"))
    return x, y


def rank_loads(experts: pa.Table) -> pa.Table:
    """``rank_load`` with all domains pooled: one row per model and number of expert-parallel ranks, 2 to 64.

    ``mean`` is over layers, ``worst`` is the largest of them. A number of ranks is left out unless it divides the
    number of experts in every layer.
    """
    keys = ["run", "strategy", "seed", "layer", "expert"]
    pooled = experts.group_by(keys, use_threads=False).aggregate([("load", "sum")])
    loads: dict[tuple[Any, ...], dict[str, list[int]]] = {}  # by model and layer, in order of expert id
    columns = [pooled[name].to_pylist() for name in ("run", "strategy", "seed", "layer", "load_sum")]
    for *model, layer, load in zip(*columns, strict=True):
        loads.setdefault(tuple(model), {}).setdefault(layer, []).append(load)
    rows = []
    for (run, strategy, seed), by_layer in loads.items():
        for ranks in RANKS:
            values = [value for load in by_layer.values() if (value := rank_load(load, ranks)) is not None]
            if len(values) == len(by_layer):
                row = {"run": run, "strategy": strategy, "seed": seed, "ranks": ranks}
                rows.append(row | {"mean": float(np.mean(values)), "worst": max(values)})
    schema = [("run", pa.string()), ("strategy", pa.string()), ("seed", pa.int64()), ("ranks", pa.int64())]
    return pa.Table.from_pylist(rows, pa.schema([*schema, ("mean", pa.float64()), ("worst", pa.float64())]))


def cost(ranks: pa.Table) -> go.Figure:
    """The busiest rank's load over the mean load, by number of expert-parallel ranks: one line per strategy.

    ``ranks`` is the table of ``rank_loads``. Values are means over layers and seeds; 1 is even.
    """
    figure = go.Figure()
    for strategy, style in strategy_styles(ranks["strategy"].to_pylist()).items():
        rows = ranks.filter(pc.equal(ranks["strategy"], strategy))
        sizes = sorted(set(rows["ranks"].to_pylist()))
        means = [float(np.mean(rows.filter(pc.equal(rows["ranks"], size))["mean"].to_numpy())) for size in sizes]
        figure.add_scatter(
            x=[str(size) for size in sizes],
            y=means,
            mode="lines+markers",
            name=plain(strategy),
            line={"color": style["color"], "dash": style["dash"]},
            marker={"color": style["color"], "symbol": style["symbol"], "size": 8},
            hovertemplate="%{y:.2f}",
        )
    figure.update_layout(
        height=300,
        margin={"l": 58, "r": 12, "t": 12, "b": 48},
        showlegend=False,
        hovermode="x unified",
        xaxis={
            "type": "category",
            "title": {"text": "expert-parallel ranks", "standoff": 8},
            "unifiedhovertitle": {"text": "%{x} ranks"},
        },
        yaxis={
            "title": {"text": "busiest rank / mean", "standoff": 8},
            "zeroline": False,
            "nticks": 6,
            "autorangeoptions": {"include": [1, 1.5]},
        },
    )
    return figure


def layers(layer_rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """MaxVio with its floor, and domain information with its bound at chance, by layer of an audit.

    ``layer_rows`` is ``audit["layers"]``.
    """
    names = layer_labels([row["layer"] for row in layer_rows])
    figure = go.Figure()
    for name, values, dash in (
        ("MaxVio", [row["maxvio"] for row in layer_rows], "solid"),
        ("MaxVio floor (sampling alone)", [row["maxvio_floor"] for row in layer_rows], "dot"),
    ):
        figure.add_scatter(
            x=names,
            y=values,
            mode="lines+markers" if dash == "solid" else "lines",
            name=name,
            line={"color": VERMILLION, "dash": dash, "width": 2 if dash == "solid" else 1.2},
            hovertemplate="%{y:.3f}",
        )
    information = [row["domain_information_bits"] for row in layer_rows]
    for name, values, dash in (
        ("domain information, bits", [bits["value"] for bits in information], "solid"),
        ("bound at chance (95 %)", [bits["bound"] for bits in information], "dot"),
    ):
        figure.add_scatter(
            x=names,
            y=values,
            yaxis="y2",
            mode="lines+markers" if dash == "solid" else "lines",
            name=name,
            line={"color": BLUE, "dash": dash, "width": 2 if dash == "solid" else 1.2},
            hovertemplate="%{y:.3f}",
        )
    figure.update_layout(
        height=440,
        margin={"l": 58, "r": 12, "t": 12, "b": 48},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hovermode="x unified",
        xaxis={"type": "category", "title": {"text": "MoE layer", "standoff": 8}, "anchor": "y2"},
        yaxis={
            "title": {"text": "MaxVio"},
            "domain": [0.54, 1],
            "autorangeoptions": {"include": [0, 0.5]},
            "nticks": 5,
            "zeroline": False,
        },
        yaxis2={
            "title": {"text": "bits"},
            "domain": [0, 0.46],
            "autorangeoptions": {"include": [0, 0.1]},
            "nticks": 5,
            "zeroline": False,
        },
    )
    return figure
