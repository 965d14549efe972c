"""Writes the pages of results of the claims, and their figure, from the stored results: those of every edition, or of
those that are named.

    equipoise reproduce all                  # takes hours; continues where it was stopped
    python benchmarks/claims.py              # writes the pages and figures that page.toml of each edition names
    python benchmarks/claims.py second       # the same for one edition
    python benchmarks/claims.py --check      # fails if the pages are not what the stored results give

Chromium draws the figure of the first edition (needs playwright and /usr/bin/chromium).
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import figures_second
import plotly.graph_objects as go
from matplotlib.figure import Figure
from picture import photograph
from plotly.subplots import make_subplots

from equipoise_lab.analysis import estimate, paired_differences
from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.edition import DEFAULT, Edition, edition_names, load_edition
from equipoise_lab.reproduce.frontier import Frontier
from equipoise_lab.reproduce.page import figure_of, pages, write
from equipoise_lab.reproduce.page.leaderboard import arms
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import findings

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "claims"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#808080")
DRAWN_FRONTIERS = ("global", "micro", "sequence", "loss-free", "phi", "shinka", "quantile", "none")
LABEL_PLACES = (
    "bottom left",
    "bottom right",
    "top left",
    "top center",
    "top center",
    "bottom center",
    "top center",
    "top center",
)
BASELINE = "global"  # the arm that others are compared with
LABEL_HEIGHT = 0.011  # nats
DONE = edition_names()[: edition_names().index(DEFAULT) + 1]  # the editions that have pages


def draw_first(edition: Edition, claims: Sequence[Claim], results: Results) -> go.Figure:
    """Left: each mechanism over its coefficient or rate. Right: the arms of the leaderboard, against the baseline."""
    leaderboard = next(claim for claim in claims if claim.name == edition.page.leaderboard)
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.11,
        subplot_titles=(
            "Over the coefficient or rate, 80 steps, two seeds (large: chosen)",
            f"As chosen, 200 steps: loss less that of {BASELINE}, 95 % intervals",
        ),
    )
    for color, name, place in zip(COLORS, DRAWN_FRONTIERS, LABEL_PLACES, strict=True):
        _frontier(figure, edition.frontiers[name], color, place, results)
    _leaderboard(figure, leaderboard, results)
    ticks = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4]
    figure.update_xaxes(
        title="MaxVio of the test text (0 is even), log scale",
        type="log",
        gridcolor="#ddd",
        linecolor="#888",
        tickvals=ticks,
    )
    figure.update_yaxes(gridcolor="#ddd", linecolor="#888", zerolinecolor="#888")
    figure.update_yaxes(title="loss of the test text, nats", col=1)
    figure.update_yaxes(title="difference in loss, nats", col=2)
    figure.update_layout(
        width=1200, height=560, margin={"l": 70, "r": 20, "t": 50, "b": 100}, template="plotly_white",
        font={"size": 13}, legend={"orientation": "h", "y": -0.18},
    )  # fmt: skip
    return figure


def _frontier(figure: go.Figure, frontier: Frontier, color: str, place: str, results: Results) -> None:
    points = [point for value in frontier.grid(results) if (point := frontier.point(value, results)) is not None]
    chosen, ends = frontier.value(results), (points[0], points[-1])
    figure.add_scatter(
        x=[point.mean("maxvio_global") for point in points],
        y=[point.mean("val_nats") for point in points],
        text=[point.value if point in ends or point.value == chosen else "" for point in points],
        textposition=place,
        textfont={"size": 10, "color": color},
        mode="lines+markers+text",
        name=frontier.name,
        line={"color": color, "width": 1.5},
        marker={
            "opacity": 1,
            "size": [12 if point.value == chosen else 5 for point in points],
            "symbol": "circle" if frontier.values else "x",
        },
        row=1,
        col=1,
    )


def _leaderboard(figure: go.Figure, claim: Claim, results: Results) -> None:
    by_arm: dict[str, Any] = arms(claim, results)
    points = []
    for arm, runs in by_arm.items():
        nats, baseline = ({seed: run["val_nats"] for seed, run in each.items()} for each in (runs, by_arm[BASELINE]))
        if set(nats) & set(baseline):
            difference = paired_differences(nats, baseline, intersect=True)
            points.append((estimate([run["maxvio_global"] for run in runs.values()]).mean, difference, arm))
    above = -math.inf  # height of the label below: labels must not overlap
    for maxvio, difference, arm in sorted(points, key=lambda point: point[1].mean):
        half = None if arm == BASELINE or difference.n < 2 else difference.interval[1] - difference.mean
        figure.add_scatter(
            x=[maxvio],
            y=[difference.mean],
            error_y={"type": "constant", "value": half or 0, "thickness": 1, "width": 3},
            mode="markers",
            marker={"color": "#333", "size": 8, "symbol": "diamond-open" if arm == BASELINE else "circle"},
            showlegend=False,
            row=1,
            col=2,
        )
        above = max(difference.mean, above + LABEL_HEIGHT)
        figure.add_annotation(
            x=math.log10(maxvio), y=difference.mean, ax=math.log10(maxvio) + 0.08, ay=above, text=arm,
            axref="x2", ayref="y2", xanchor="left", arrowhead=0, arrowwidth=0.7, arrowcolor="#999",
            font={"size": 12}, row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(range=[math.log10(0.2), math.log10(3.6)], row=1, col=2)


Draw = Callable[[Edition, Sequence[Claim], Results], go.Figure | Figure]
FIGURES: Mapping[str, Mapping[str, Draw]] = {  # by edition and file
    "first": {"docs/figures/claims_first.png": draw_first},
    "second": {
        "docs/figures/claims_second.png": figures_second.quality_against_balance,
        "docs/figures/claims_length.png": figures_second.lengths,
    },
}


def save(figure: go.Figure | Figure, path: Path) -> None:
    if isinstance(figure, Figure):
        figure.savefig(path, dpi=160)
    else:
        photograph(figure, path)


def main() -> None:
    names, is_check = [name for name in sys.argv[1:] if name != "--check"], "--check" in sys.argv[1:]
    for edition in map(load_edition, names or edition_names()):
        page, results = ROOT / edition.page.path, edition.results(RESULTS)
        if not names and not page.exists() and edition.name not in DONE:
            continue  # its runs have just begun
        claims = edition.claims_with_values(results)
        all_findings = findings(claims, results)
        if is_check:
            figure = figure_of(edition) if (ROOT / edition.page.figure).exists() else None
            for name, text in pages(page.name, edition, claims, all_findings, results, figure).items():
                if not page.with_name(name).exists() or text != page.with_name(name).read_text(encoding="utf-8"):
                    command = f"python benchmarks/claims.py {edition.name}"
                    sys.exit(f"{page.with_name(name)} must match the stored results: run {command}")
            continue
        missing = {finding.claim.name for finding in all_findings if finding.is_primary and finding.is_missing}
        without_runs = {file for name, file in edition.page.claim_figures.items() if name in missing}
        for file, draw in FIGURES.get(edition.name, {}).items():
            if file not in without_runs:
                save(draw(edition, claims, results), ROOT / file)
        write(page, edition, claims, all_findings, results)


if __name__ == "__main__":
    main()
