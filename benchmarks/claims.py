"""What came out of the claims: the page and its picture, from the results that are stored.

    equipoise reproduce all                  # hours; goes on where it was stopped
    python benchmarks/claims.py              # writes docs/results.md and docs/figures/claims.png

The picture is drawn by Chromium (needs playwright and /usr/bin/chromium).
"""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from picture import photograph
from plotly.subplots import make_subplots

from equipoise.analysis import estimate, paired_differences
from equipoise.reproduce.claim import Claim, claim_names, load_claim
from equipoise.reproduce.frontier import FRONTIERS, Frontier
from equipoise.reproduce.page import FIGURE, LEADERBOARD, arms, write
from equipoise.reproduce.runs import Results
from equipoise.reproduce.verdict import findings

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "claims"
PAGE = ROOT / "docs" / "results.md"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#808080")
SHOWN = ("global", "micro", "sequence", "loss-free", "phi", "shinka", "quantile", "none")
BASELINE = "global"  # the arm that the others are set against


def draw(leaderboard: Claim, results: Results) -> go.Figure:
    """Left: what each mechanism reaches over its number. Right: the leaderboard's arms, against one of them."""
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.11,
        subplot_titles=(
            "Over the coefficient or rate, 80 steps, two seeds",
            f"As chosen, 200 steps: loss less that of {BASELINE}, 95 % intervals",
        ),
    )
    for color, name in zip(COLORS, SHOWN, strict=True):
        _frontier(figure, FRONTIERS[name], color, results)
    _leaderboard(figure, leaderboard, results)
    ticks = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4]
    figure.update_xaxes(
        title="MaxVio of the test text (0 is even)", type="log", gridcolor="#ddd", linecolor="#888", tickvals=ticks
    )
    figure.update_xaxes(range=[-1.3, 0.1], col=2)
    figure.update_yaxes(gridcolor="#ddd", linecolor="#888", zerolinecolor="#888")
    figure.update_yaxes(title="loss of the test text, nats", col=1)
    figure.update_yaxes(title="difference in loss, nats", col=2)
    figure.update_layout(
        width=1200, height=520, margin={"l": 70, "r": 20, "t": 50, "b": 100}, template="plotly_white",
        font={"size": 13}, legend={"orientation": "h", "y": -0.18},
    )  # fmt: skip
    return figure


def _frontier(figure: go.Figure, frontier: Frontier, color: str, results: Results) -> None:
    points = [point for value in frontier.grid(results) if (point := frontier.point(value, results)) is not None]
    figure.add_scatter(
        x=[point.mean("maxvio_global") for point in points],
        y=[point.mean("val_nats") for point in points],
        text=[point.value for point in points],
        textposition="top center",
        textfont={"size": 9, "color": color},
        mode="lines+markers+text",
        name=frontier.name,
        line={"color": color, "width": 1.5},
        marker={"size": 7 if frontier.values else 11, "symbol": "circle" if frontier.values else "x"},
        row=1,
        col=1,
    )


def _leaderboard(figure: go.Figure, claim: Claim, results: Results) -> None:
    by_arm: dict[str, Any] = arms(claim, results)
    for arm, runs in by_arm.items():
        nats, baseline = ({seed: run["val_nats"] for seed, run in each.items()} for each in (runs, by_arm[BASELINE]))
        if not set(nats) & set(baseline):
            continue
        difference = paired_differences(nats, baseline, intersect=True)
        balance = estimate([run["maxvio_global"] for run in runs.values()])
        half = None if arm == BASELINE or difference.n < 2 else difference.interval[1] - difference.mean
        figure.add_scatter(
            x=[balance.mean],
            y=[difference.mean],
            error_y={"type": "constant", "value": half or 0, "thickness": 1, "width": 3},
            text=[arm],
            textposition="top right",
            textfont={"size": 11},
            mode="markers+text",
            marker={"color": "#333", "size": 8},
            showlegend=False,
            row=1,
            col=2,
        )


if __name__ == "__main__":
    results = Results(RESULTS)
    chosen = {name: frontier.chosen(results) for name, frontier in FRONTIERS.items()}
    claims = [load_claim(name).with_values(chosen) for name in claim_names()]
    photograph(draw(next(c for c in claims if c.name == LEADERBOARD), results), PAGE.parent / FIGURE)
    write(PAGE, claims, findings(claims, results), results)
