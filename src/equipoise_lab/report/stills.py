"""Still pictures of plotly figures, drawn with matplotlib, for pages without JavaScript."""

import base64
import html
import io
import math
import warnings
from typing import Any

import numpy as np
import plotly.graph_objects as go

__all__ = ["still"]

DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X"}
WIDTH, DPI = 620, 130  # of a picture, in pixels on the page; dots per inch
TALLEST = 8000  # pixels; matplotlib refuses a picture of 2**16 dots
LEFT, RIGHT, TOP, BOTTOM, BAR = 88, 12, 26, 44, 58  # margins in pixels, and what a colour bar takes on the right
LONGEST = 100  # characters of a name; longer ones would leave no room for the picture


def still(figure: go.Figure) -> str:
    """The figure as PNG in base64: lines, marks, error bars or a heat map, with a legend or a colour bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    is_map = any(trace.type == "heatmap" for trace in figure.data)
    has_two = "yaxis2" in figure.layout
    height = min(max(figure.layout.height or 400, 150), TALLEST)
    picture = Figure(figsize=(WIDTH / 100, height / 100))
    FigureCanvasAgg(picture)
    axes: list[Any] = picture.subplots(2 if has_two else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
    right = 1 - (RIGHT + (BAR if is_map else 0)) / WIDTH  # fixed margins: an automatic layout takes most of the time
    picture.subplots_adjust(left=LEFT / WIDTH, right=right, bottom=BOTTOM / height, top=1 - TOP / height)
    for trace in figure.data:
        axis = axes[-1] if has_two and trace.yaxis == "y2" else axes[0]
        _draw_map(picture, axis, trace, figure.layout) if is_map else _draw_line(axis, trace)
    for axis, y in zip(axes, (figure.layout[name] for name in ("yaxis", "yaxis2")), strict=False):
        axis.set_ylabel(_text(y.title.text or ""), fontsize=8)
        axis.tick_params(labelsize=8)
        if y.type == "log":
            axis.set_yscale("log")
        if not is_map:
            axis.grid(color="#e6e4de")
            axis.update_datalim([(axis.dataLim.x0, value) for value in _included(y)], updatex=False)
            axis.autoscale_view()
            if len(axis.get_legend_handles_labels()[1]) > 1:
                axis.legend(fontsize=7, loc="best", frameon=False)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    if figure.layout.title.text:
        axes[0].set_title(_text(figure.layout.title.text), fontsize=9, loc="left")
    axes[-1].set_xlabel(_text(figure.layout.xaxis.title.text or ""), fontsize=8)
    file = io.BytesIO()
    with warnings.catch_warnings():  # a character that the font lacks is a box; the tables have it
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        picture.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()


def _text(text: str) -> str:
    """Text of a plotly figure for matplotlib, which would take what is between two ``$`` for a formula."""
    text = html.unescape(text)
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]}…").replace("$", r"\$")


def _included(axis: Any) -> list[float]:
    values = list(axis.autorangeoptions.include or []) + ([0.0] if axis.rangemode == "tozero" else [])
    return [value for value in values if math.isfinite(value)]


def _draw_line(axis: Any, trace: Any) -> None:
    x = [_text(value) if isinstance(value, str) else value for value in trace.x]
    y = np.array([np.nan if value is None else value for value in trace.y], float)
    has_line, has_marks = "lines" in trace.mode, "markers" in trace.mode
    color = (trace.line.color if has_line else trace.marker.color) or "#0072B2"
    label = _text(trace.name) if trace.name and trace.showlegend is not False else None
    if label is not None and label in axis.get_legend_handles_labels()[1]:
        label = None
    style: dict[str, Any] = {
        "color": color,
        "linestyle": DASHES[trace.line.dash or "solid"] if has_line else "",
        "linewidth": 1.4,
        "marker": SYMBOLS[trace.marker.symbol or "circle"] if has_marks else "",
        "markersize": (trace.marker.size or 6) / 1.6 if has_marks else 0,
        "alpha": trace.marker.opacity if has_marks and trace.marker.opacity else 1.0,
    }
    if trace.error_y.visible:
        errors = {
            "yerr": list(trace.error_y.array),
            "xerr": [list(trace.error_x.arrayminus), list(trace.error_x.array)],
        }
        axis.errorbar(x, y, **errors, label=label, capsize=2, **style)
    else:
        axis.plot(x, y, label=label, **style)


def _draw_map(picture: Any, axis: Any, trace: Any, layout: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    scale = [(place, color) for place, color in layout.coloraxis.colorscale]
    z = np.array([[np.nan if value is None else value for value in row] for row in trace.z], float)
    colors = LinearSegmentedColormap.from_list("load", scale)
    image = axis.imshow(
        z, aspect="auto", interpolation="nearest", cmap=colors, vmin=layout.coloraxis.cmin, vmax=layout.coloraxis.cmax
    )
    box = axis.get_position()
    bar = picture.colorbar(image, cax=picture.add_axes((box.x1 + 8 / WIDTH, box.y0, 12 / WIDTH, box.height)))
    bar.set_label("× even", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if layout.yaxis.ticktext:
        axis.set_yticks(list(layout.yaxis.tickvals), [_text(text) for text in layout.yaxis.ticktext], fontsize=7)
    if layout.xaxis.showticklabels is False:
        axis.set_xticks([])
    elif trace.x is not None:  # columns are numbered by their place; their names are the values of x
        places = np.unique(np.linspace(0, z.shape[1] - 1, 6).round().astype(int))
        axis.set_xticks(places, [str(trace.x[place]) for place in places])
