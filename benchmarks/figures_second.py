"""The figures of the second edition of the evidence. ``benchmarks/claims.py`` saves them."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from equipoise_lab.analysis import Estimate, estimate, paired_differences
from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.edition import Edition
from equipoise_lab.reproduce.page.leaderboard import arms
from equipoise_lab.reproduce.results import Results

COLORS = {
    "global": "#0072B2",
    "micro": "#D55E00",
    "sequence": "#009E73",
    "loss-free": "#CC79A7",
    "quantile": "#E69F00",
    "quantile-global": "#000000",
}
OTHER = "#666666"  # candidates
GATES = ("softmax", "sigmoid")
MARKERS = {"softmax": "o", "sigmoid": "s"}
BASELINE = "softmax-global"
TICKS = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3]
LENGTH_CLAIM = "9-length"


def quality_against_balance(edition: Edition, claims: Sequence[Claim], results: Results) -> Figure:
    """Each mechanism over its coefficient or rate, one panel a gate; then all of them as chosen."""
    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    panels = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1, 1, 1.15]})
    for axes, gate in zip(panels, GATES, strict=False):
        _frontiers(axes, edition, gate, results)
    panels[1].sharey(panels[0])
    board = next(claim for claim in claims if claim.name == edition.page.leaderboard)
    _board(panels[2], board, results)
    handles = {
        label: handle for axes in panels[:2] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=len(handles), frameon=False)
    return figure


def _mechanism(name: str) -> str:
    """``softmax-quantile-global`` -> ``quantile-global``"""
    return name.partition("-")[2]


def _frontiers(axes: Axes, edition: Edition, gate: str, results: Results) -> None:
    for name, frontier in edition.frontiers.items():
        if not name.startswith(f"{gate}-"):
            continue
        points = [point for value in frontier.grid(results) if (point := frontier.point(value, results)) is not None]
        if not points:
            continue
        color, chosen = COLORS.get(_mechanism(name), OTHER), frontier.value(results)
        x = [point.mean("maxvio_global") for point in points]
        y = [point.mean("val_nats") for point in points]
        axes.plot(x, y, color=color, linewidth=1.3, marker=MARKERS[gate], markersize=4, label=_mechanism(name))
        for point, left, height in zip(points, x, y, strict=True):
            if point.value == chosen:
                axes.plot(left, height, MARKERS[gate], color=color, markersize=10)
            if point.value:
                axes.annotate(point.value, (left, height), (4, 4), textcoords="offset points", fontsize=8, color=color)
    seeds = len(next(iter(edition.frontiers.values())).seeds)  # equal in all
    number = "one seed" if seeds == 1 else f"{seeds} seeds"
    axes.set_title(f"{gate} scores, over the coefficient or rate\n({number}; large: chosen)", fontsize=11)
    axes.set_ylabel("loss of the test text, nats")
    _balance_axis(axes)


def _board(axes: Axes, claim: Claim, results: Results) -> None:
    by_arm: dict[str, Any] = arms(claim, results)
    points: list[tuple[str, float, Estimate]] = []
    for arm, runs in by_arm.items():
        nats, baseline = ({seed: run["val_nats"] for seed, run in each.items()} for each in (runs, by_arm[BASELINE]))
        if len(set(nats) & set(baseline)) > 1:
            balance = estimate([runs[seed]["maxvio_global"] for seed in set(nats) & set(baseline)]).mean
            points.append((arm, balance, paired_differences(nats, baseline, intersect=True)))
    for arm, balance, difference in points:
        gate, mechanism = arm.partition("-")[0], _mechanism(arm)
        half = 0 if arm == BASELINE else difference.interval[1] - difference.mean
        color = COLORS.get(mechanism, OTHER)
        axes.errorbar(balance, difference.mean, half, fmt=MARKERS.get(gate, "D"), color=color, capsize=3, markersize=7)
        axes.annotate(
            arm, (balance, difference.mean), (7, 3), textcoords="offset points", fontsize=8.5, color=color, va="bottom"
        )
    axes.axhline(0, color="#999999", linewidth=0.8)
    seeds = " or ".join(str(n) for n in sorted({difference.n for arm, _, difference in points if arm != BASELINE}))
    axes.set_title(f"as chosen: loss less that of {BASELINE}\n({seeds or 'no'} seeds, 95 % intervals)", fontsize=11)
    axes.set_ylabel("difference in loss, nats")
    _balance_axis(axes)
    if points:
        left, right = axes.get_xlim()
        axes.set_xlim(left, right * (right / left) ** 0.25)  # room for the names


def _balance_axis(axes: Axes) -> None:
    if not axes.has_data():
        axes.set_xlim(TICKS[0], TICKS[-1])  # before any run
    axes.set_xscale("log")
    axes.set_xticks(TICKS)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("MaxVio of the test text (0 is even), log scale")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def lengths(edition: Edition, claims: Sequence[Claim], results: Results) -> Figure:
    """The difference of Loss-Free from the losses within sequences and over the global batch, at three lengths."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (against, color) in enumerate((("sequence", COLORS["sequence"]), ("global", COLORS["global"]))):
        points = [
            (steps, difference)
            for steps, (of, other) in _arms_by_length(against).items()
            if (difference := _difference(claims, results, of, other)) is not None
        ]
        x = [steps * (1 + 0.03 * number) for steps, _ in points]  # beside each other
        low, high = zip(*(difference.interval for _, difference in points), strict=True) if points else ((), ())
        y = [difference.mean for _, difference in points]
        errors = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        label = {"sequence": "Loss-Free less the loss within sequences", "global": "less the loss over the batch"}[
            against
        ]
        axes.errorbar(x, y, errors, marker="os"[number], color=color, capsize=4, label=label)
        for left, (_, difference) in zip(x, points, strict=True):
            text = f"{difference.n} seeds"
            axes.annotate(text, (left, difference.mean), (6, 6), textcoords="offset points", fontsize=8, color=color)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xlim(80, 1000)
    axes.set_xscale("log", base=2)
    axes.set_xticks([100, 200, 400, 800])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("steps of the training, log scale")
    axes.set_ylabel("difference in loss, nats (95 % intervals)")
    axes.set_title("Does the advantage of Loss-Free grow with length? (sigmoid scores)", fontsize=11)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    return figure


Arm = tuple[str, str]  # claim and arm


def _arms_by_length(against: str) -> dict[int, tuple[Arm, Arm]]:
    short = "4-loss-free" if against == "sequence" else "4-loss-free-same-scope"
    return {
        100: ((LENGTH_CLAIM, "loss-free-100"), (LENGTH_CLAIM, f"{against}-100")),
        200: ((short, "loss-free"), (short, against)),
        800: ((LENGTH_CLAIM, "loss-free"), (LENGTH_CLAIM, against)),
    }


def _difference(claims: Sequence[Claim], results: Results, of: Arm, against: Arm) -> Estimate | None:
    values = [_losses(claims, results, *arm) for arm in (of, against)]
    difference = paired_differences(*values, intersect=True) if set(values[0]) & set(values[1]) else None
    return None if difference is None or difference.n < 2 or not math.isfinite(difference.sd) else difference


def _losses(claims: Sequence[Claim], results: Results, name: str, arm: str) -> dict[int, float]:
    claim = next(claim for claim in claims if claim.name == name)
    stored = {seed: (results.get(claim.job(arm, seed)) or {}).get("result", {}) for seed in claim.all_seeds}
    return {seed: result["val_nats"] for seed, result in stored.items() if result.get("val_nats") is not None}
