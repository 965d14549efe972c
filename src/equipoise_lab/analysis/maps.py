"""Plotly heat maps of load by expert, and what figures of experts share."""

import html
import re
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["CAP", "DIVERGING", "expert_map", "layer_labels", "load_over_time", "plain", "relative_load"]

CAP = 4.0  # relative loads from here on share one colour, on every page
DIVERGING = [[0, "#2f7fb8"], [0.25, "#f3f0e9"], [0.55, "#e8954a"], [1, "#7f2a00"]]  # an even load, 1, is at 1 / CAP


def plain(text: str) -> str:
    """Escapes text for plotly, which interprets some HTML tags in its strings, and formulas between two ``$``."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def relative_load(load: Sequence[int]) -> list[float | None]:
    """Load of each expert over the mean load, ``E c_e / sum(c)``. An even load is 1 everywhere. None if nothing was
    assigned.

    >>> relative_load([6, 1, 1, 0])
    [3.0, 0.5, 0.5, 0.0]
    """
    total = int(sum(load))
    return [int(count) * len(load) / total if total else None for count in load]


def expert_map(experts: pa.Table, *, run: str | None = None, layer: str | None = None, most: float = CAP) -> go.Figure:
    """Relative load by domain and expert in one layer (default: the last layer of the first run). 1 is even.

    Experts are sorted by the domain that uses them most, then by that domain's relative load. Loads of ``most`` and
    above share one colour.
    """
    rows, domains, load = _one_layer(experts, run, layer)
    z = [relative_load(counts) for counts in load.tolist()]
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


def load_over_time(
    loads: pa.Table, *, run: str | None = None, layer: str | None = None, most: float = CAP
) -> go.Figure:
    """Relative load of the training batches by expert and step in one layer (default: the last layer of the first run).

    Rows are experts by id. A row that stays blue is a starved expert; a row that turns orange is overloaded. For a long
    run, pass ``Records.loads(most)``.
    """
    rows, steps, load = _one_layer(loads, run, layer)
    z = np.array([relative_load(counts) for counts in load.tolist()], float).T
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


def _one_layer(experts: pa.Table, run: str | None, layer: str | None) -> tuple[pa.Table, list[str], np.ndarray]:
    """Rows, domains and load (domains, experts) of one layer. A table of ``Records.loads`` has steps in place of
    domains."""
    for name, value in (("run", run), ("layer", layer)):
        names = pc.unique(experts[name]).to_pylist()
        if value is not None and value not in names:
            raise ValueError(f"{name} must be in the table: got {value!r}. Use one of {', '.join(names)}.")
        value = value or (names[0] if name == "run" else names[-1])
        experts = experts.filter(pc.equal(experts[name], value))
    key = "domain" if "domain" in experts.column_names else "step"
    names = pc.unique(experts[key]).to_pylist()
    return experts, names, experts["load"].to_numpy().reshape(len(names), -1)


def _arg_max(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def layer_labels(names: Sequence[str]) -> list[str]:
    """The first number in each module name if these numbers are distinct, otherwise the whole names.

    >>> layer_labels(["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"])
    ['1', '2']
    """
    numbers = [match.group() if (match := re.search(r"\d+", name)) else "" for name in names]
    return numbers if all(numbers) and len(set(numbers)) == len(numbers) else list(names)
