"""tables -> plotly figures. Strategies have their colours, the theme has none: the report adds light or dark.

>>> records = read_records("runs/demo")  # doctest: +SKIP
>>> quality_against_balance(records.runs()).show()  # doctest: +SKIP
>>> curve(records.steps(), "maxvio_batch").write_image("maxvio.svg")  # needs kaleido  # doctest: +SKIP
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc

from equipoise_lab.analysis.specialisation import RANKS, rank_load
from equipoise_lab.analysis.statistics import estimate

__all__ = [
    "CAP",
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
    "strategy_styles",
]

CAP = 4.0  # relative load at and above which the colour stays the same, on every page
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
GREY = "#808080"
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
MOST_POINTS = 400


def strategy_styles(strategies: Iterable[str]) -> dict[str, dict[str, str]]:
    """A fixed colour (Okabe and Ito's, which the colour-blind tell apart), dash and symbol for each strategy, by order;
    ``none`` is grey."""
    known = list(dict.fromkeys(strategies))
    styles = {"none": {"color": GREY, "dash": "solid", "symbol": "x"}} if "none" in known else {}
    for i, strategy in enumerate(name for name in known if name != "none"):
        styles[strategy] = {"color": OKABE_ITO[i % 7], "dash": DASHES[i // 7 % 4], "symbol": SYMBOLS[i // 7 % 4]}
    return styles


def plain(text: str) -> str:
    """Text for plotly, which reads a small HTML in its strings."""
    return html.escape(text, quote=False)


def quality_against_balance(
    runs: pa.Table, *, quality: str = "val_nats", balance: str = "maxvio_global", level: float = 0.95
) -> go.Figure:
    """A mark a strategy, means over seeds with t intervals in both directions, and a small one for each run: the lower
    left is best. Runs that are not finished, or diverged, are left out.

    Where strategies share at least two seeds, those are drawn, and what a seed does to all strategies alike is taken
    out, as it is of paired differences: from each value the seed's mean over strategies, less the mean over all. The
    spread that is left is widened by ``sqrt(S / (S - 1))`` for S strategies, since taking out means takes out some of
    it. ``figure.layout.meta["paired"]`` says whether that was done. Source: Cousineau 2005, Tutorials in Quantitative
    Methods for Psychology 1, 42-45; Morey 2008, same journal 4, 61-64.
    """
    styles = strategy_styles(runs["strategy"].to_pylist())
    values: dict[str, dict[int, np.ndarray]] = {}  # by strategy and seed, (balance, quality)
    for row in runs.select(["strategy", "seed", balance, quality]).to_pylist():
        if row[balance] is not None and row[quality] is not None:
            values.setdefault(row["strategy"], {})[row["seed"]] = np.array([row[balance], row[quality]])
    values, widen = _without_seeds(values)
    figure = go.Figure()
    for strategy, of_seed in values.items():
        x, y = np.stack(list(of_seed.values())).T
        across, up = estimate(x.tolist(), level=level), estimate(y.tolist(), level=level)
        reach = [widen * (e.interval[1] - e.mean) if e.n > 1 else 0.0 for e in (across, up)]
        color = styles[strategy]["color"]
        mark = {"color": color, "symbol": styles[strategy]["symbol"]}
        if len(of_seed) > 1:
            figure.add_scatter(
                x=x.tolist(),
                y=y.tolist(),
                mode="markers",
                marker={**mark, "size": 5, "opacity": 0.45},
                name=plain(strategy),
                legendgroup=strategy,
                showlegend=False,
                customdata=list(of_seed),
                hovertemplate="seed %{customdata}: MaxVio %{x:.3f}, %{y:.4f} nats<extra>%{fullData.name}</extra>",
            )
        figure.add_scatter(
            x=[across.mean],
            y=[up.mean],
            mode="markers",
            marker={**mark, "size": 13},
            name=plain(strategy),
            legendgroup=strategy,
            error_x=_bar(reach[0], color, len(of_seed) > 1) | {"arrayminus": [min(reach[0], max(across.mean, 0.0))]},
            error_y=_bar(reach[1], color, len(of_seed) > 1),
            hovertemplate="MaxVio %{x:.3f}, %{y:.4f} nats<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        height=400,
        margin={"l": 58, "r": 12, "t": 12, "b": 48},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hovermode="closest",
        xaxis={
            "title": {"text": "MaxVio on test text (0 is even) →", "standoff": 8},
            "zeroline": False,
            "rangemode": "nonnegative",
        },
        yaxis={"title": {"text": "loss, nats a token", "standoff": 8}, "zeroline": False, "nticks": 6},
        meta={"paired": widen > 1},
    )
    return figure


def _without_seeds(
    values: Mapping[str, Mapping[int, np.ndarray]],
) -> tuple[dict[str, dict[int, np.ndarray]], float]:
    """Values without what seeds have in common, and the factor that spreads are to be widened by; as they are, and 1,
    where fewer than two seeds are shared."""
    seeds = set.intersection(*map(set, values.values())) if values else set()
    if len(values) < 2 or len(seeds) < 2:
        return {strategy: dict(of_seed) for strategy, of_seed in values.items()}, 1.0
    effect = {seed: np.mean([of_seed[seed] for of_seed in values.values()], axis=0) for seed in seeds}
    middle = np.mean(list(effect.values()), axis=0)
    kept = {
        strategy: {seed: of_seed[seed] - effect[seed] + middle for seed in sorted(seeds)}
        for strategy, of_seed in values.items()
    }
    return kept, math.sqrt(len(values) / (len(values) - 1))


def _bar(reach: float, color: str, visible: bool) -> dict[str, Any]:
    return {"type": "data", "array": [reach], "visible": visible, "color": color, "thickness": 1.3, "width": 4}


def curve(steps: pa.Table, key: str, *, title: str = "", log: bool = False, most: int = MOST_POINTS) -> go.Figure:
    """One line a run of ``key`` over steps. Runs of more than ``most`` steps are drawn as means of equal windows; their
    length is ``figure.layout.meta["window"]`` (1: every step is a point)."""
    if key not in steps.column_names or not pa.types.is_floating(steps[key].type):
        known = [f.name for f in steps.schema if pa.types.is_floating(f.type)]
        raise ValueError(f"key must be a figure of the table: got {key!r}, it has {', '.join(known)}.")
    runs = pc.unique(steps["run"]).to_pylist()
    strategies = pc.unique(steps["strategy"]).to_pylist()
    styles = strategy_styles(strategies)
    parts = {run: steps.filter(pc.equal(steps["run"], run)) for run in runs}
    window = max(1, math.ceil(max((part.num_rows for part in parts.values()), default=0) / most))
    figure = go.Figure()
    for run, part in parts.items():
        strategy, seed = part["strategy"][0].as_py(), part["seed"][0].as_py()
        x, y = _points(part["step"].to_numpy(), part[key].to_numpy().astype(float), window, positive=log)
        if all(value is None for value in y):
            continue
        style = styles[strategy]
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            name=plain(strategy + (f", seed {seed}" if len(runs) > len(strategies) else "")),
            meta={"strategy": strategies.index(strategy), "run": run},
            line={"width": 1.1 if len(runs) > len(strategies) else 2, "color": style["color"], "dash": style["dash"]},
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
        yaxis={"type": "log" if log else "linear", "zeroline": False, "nticks": 8, "tickformat": "~g"},
        meta={"window": window},
    )
    if log:
        figure.update_yaxes(dtick="D2", minor={"showgrid": False})
    return figure


def _points(steps: np.ndarray, values: np.ndarray, window: int, positive: bool) -> tuple[list, list]:
    x, y = [], []
    for start in range(0, len(steps), window):
        part = values[start : start + window]
        part = part[np.isfinite(part)]
        mean = float(part.mean()) if len(part) else None
        x.append(int(steps[start : start + window][-1]))
        y.append(None if mean is None or (positive and mean <= 0) else float(f"{mean:.5g}"))
    return x, y


def relative_load(load: Sequence[int]) -> list[float | None]:
    """Load of each expert over the mean load, ``E c_e / sum(c)``: 1 everywhere when even; None without assignments.

    >>> relative_load([6, 1, 1, 0])
    [3.0, 0.5, 0.5, 0.0]
    """
    total = int(sum(load))
    return [int(count) * len(load) / total if total else None for count in load]


def expert_map(experts: pa.Table, *, run: str | None = None, layer: str | None = None, most: float = CAP) -> go.Figure:
    """Domain x expert of one layer (default: of the first run, its last layer): relative load, 1 where even.

    Experts are sorted by the domain that uses them most, then by how much it does. The colour stays the same from
    ``most`` on.
    """
    rows, domains, load = _one_layer(experts, run, layer)
    z = [relative_load(of_domain) for of_domain in load.tolist()]
    by_expert = [[value or 0.0 for value in column] for column in zip(*z, strict=True)]
    order = sorted(range(len(by_expert)), key=lambda e: (_arg_max(by_expert[e]), -max(by_expert[e]), e))
    figure = go.Figure(
        go.Heatmap(
            x=[str(e) for e in order],
            y=list(range(len(domains))),
            z=[[None if (value := row[e]) is None else round(value, 3) for e in order] for row in z],
            xgap=1,
            ygap=1,
            coloraxis="coloraxis",
            customdata=[[plain(domain)] * len(order) for domain in domains],
            hovertemplate="%{customdata}, expert %{x}: %{z:.2f} × even<extra></extra>",
        )
    )
    figure.update_layout(
        height=56 + 21 * len(domains),
        margin={"l": 92, "r": 6, "t": 6, "b": 30},
        coloraxis={"cmin": 0, "cmid": 1, "cmax": most, "colorscale": DIVERGING, "colorbar": {"title": "× even"}},
        xaxis={
            "type": "category",
            "showticklabels": False,
            "ticks": "",
            "showgrid": False,
            "title": {"text": "experts, sorted", "standoff": 4, "font": {"size": 12}},
        },
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "tickmode": "array",
            "tickvals": list(range(len(domains))),
            "ticktext": [plain(_short(domain, 13)) for domain in domains],
        },
        meta={"run": rows["run"][0].as_py(), "layer": rows["layer"][0].as_py()},
    )
    return figure


DIVERGING = [[0, "#2f7fb8"], [0.25, "#f3f0e9"], [0.55, "#e8954a"], [1, "#7f2a00"]]  # 1, even, is at 1 / CAP


def _one_layer(experts: pa.Table, run: str | None, layer: str | None) -> tuple[pa.Table, list[str], np.ndarray]:
    """Rows, domains and load (domains, experts) of one layer; in a table of ``loads``, steps for domains."""
    for name, value in (("run", run), ("layer", layer)):
        known = pc.unique(experts[name]).to_pylist()
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of the table: got {value!r}, it has {', '.join(known)}.")
        value = value or (known[0] if name == "run" else known[-1])
        experts = experts.filter(pc.equal(experts[name], value))
    key = "domain" if "domain" in experts.column_names else "step"
    names = pc.unique(experts[key]).to_pylist()
    return experts, names, experts["load"].to_numpy().reshape(len(names), -1)


def load_over_time(
    loads: pa.Table, *, run: str | None = None, layer: str | None = None, most: float = CAP
) -> go.Figure:
    """Expert x step of one layer (default: of the first run, its last layer): relative load of the training batches.

    Experts keep their numbers: a row that stays blue is an expert that starves, one that turns orange takes over. Give
    ``Records.loads(most)`` for a long run.
    """
    rows, steps, load = _one_layer(loads, run, layer)
    z = np.array([relative_load(of_step) for of_step in load.tolist()], float).T
    figure = go.Figure(
        go.Heatmap(
            x=steps,
            y=list(range(z.shape[0])),
            z=z.round(3),
            coloraxis="coloraxis",
            hovertemplate="step %{x}, expert %{y}: %{z:.2f} × even<extra></extra>",
        )
    )
    figure.update_layout(
        height=120 + min(300, 6 * z.shape[0]),
        margin={"l": 52, "r": 6, "t": 6, "b": 44},
        coloraxis={"cmin": 0, "cmid": 1, "cmax": most, "colorscale": DIVERGING, "colorbar": {"title": "× even"}},
        xaxis={"title": {"text": "step", "standoff": 8, "font": {"size": 12}}, "showgrid": False, "zeroline": False},
        yaxis={"title": {"text": "expert"}, "showgrid": False, "zeroline": False},
        meta={"run": rows["run"][0].as_py(), "layer": rows["layer"][0].as_py()},
    )
    return figure


def rank_loads(experts: pa.Table) -> pa.Table:
    """A row a model and size of expert parallelism, 2 to 64: ``rank_load`` of the pooled text, the ``mean`` over layers
    and the ``worst`` layer. Sizes that do not divide the experts of every layer are left out."""
    keys = ["run", "strategy", "seed", "layer", "expert"]
    pooled = experts.group_by(keys, use_threads=False).aggregate([("load", "sum")])
    loads: dict[tuple[Any, ...], dict[str, list[int]]] = {}  # by run and layer, in the order of experts
    columns = [pooled[name].to_pylist() for name in ("run", "strategy", "seed", "layer", "load_sum")]
    for *model, layer, load in zip(*columns, strict=True):
        loads.setdefault(tuple(model), {}).setdefault(layer, []).append(load)
    rows = []
    for (run, strategy, seed), of_layer in loads.items():
        for ranks in RANKS:
            found = [rank_load(load, ranks) for load in of_layer.values()]
            values = [value for value in found if value is not None]
            if len(values) == len(found):
                row = {"run": run, "strategy": strategy, "seed": seed, "ranks": ranks}
                rows.append(row | {"mean": float(np.mean(values)), "worst": max(values)})
    schema = [("run", pa.string()), ("strategy", pa.string()), ("seed", pa.int64()), ("ranks", pa.int64())]
    return pa.Table.from_pylist(rows, pa.schema([*schema, ("mean", pa.float64()), ("worst", pa.float64())]))


def cost(ranks: pa.Table) -> go.Figure:
    """The busiest rank's load over the mean against the number of ranks of expert parallelism, from ``rank_loads``: a
    line a strategy, the mean over layers and seeds. 1 is even."""
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
            "title": {"text": "ranks of expert parallelism", "standoff": 8},
            "unifiedhovertitle": {"text": "%{x} ranks"},
        },
        yaxis={"title": {"text": "busiest rank / mean", "standoff": 8}, "zeroline": False, "nticks": 6},
    )
    return figure


def layers(layer_rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """By layer of an audit (``audit["layers"]``): MaxVio and its floor, domain information and what chance gives."""
    names = layer_labels([row["layer"] for row in layer_rows])
    figure = go.Figure()
    for name, values, dash in (
        ("MaxVio", [row["maxvio"] for row in layer_rows], "solid"),
        ("its floor", [row["maxvio_floor"] for row in layer_rows], "dot"),
    ):
        figure.add_scatter(
            x=names,
            y=values,
            mode="lines+markers" if dash == "solid" else "lines",
            name=name,
            line={"color": OKABE_ITO[1], "dash": dash, "width": 2 if dash == "solid" else 1.2},
            hovertemplate="%{y:.3f}",
        )
    information = [row["domain_information_bits"] for row in layer_rows]
    for name, values, dash in (
        ("domain information, bits", [found["value"] for found in information], "solid"),
        ("95 % of chance lies below", [found["bound"] for found in information], "dot"),
    ):
        figure.add_scatter(
            x=names,
            y=values,
            yaxis="y2",
            mode="lines+markers" if dash == "solid" else "lines",
            name=name,
            line={"color": OKABE_ITO[0], "dash": dash, "width": 2 if dash == "solid" else 1.2},
            hovertemplate="%{y:.3f}",
        )
    figure.update_layout(
        height=440,
        margin={"l": 58, "r": 12, "t": 12, "b": 48},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hovermode="x unified",
        xaxis={"type": "category", "title": {"text": "MoE layer", "standoff": 8}, "anchor": "y2"},
        yaxis={"title": {"text": "MaxVio"}, "domain": [0.54, 1], "rangemode": "tozero", "nticks": 5, "zeroline": False},
        yaxis2={"title": {"text": "bits"}, "domain": [0, 0.46], "rangemode": "tozero", "nticks": 5, "zeroline": False},
    )
    return figure


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
