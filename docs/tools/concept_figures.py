"""Writes the figures of docs/concepts: ``python docs/tools/concept_figures.py runs/concepts``.

The folder keeps two short runs of the lab, three minutes on two cores together; they are made if they are missing.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from equipoise_lab.analysis import read_records

FIGURES = Path(__file__).parents[1] / "figures"
STRATEGIES = {"none": "none", "lbl": "lbl:scope=global_batch,coefficient=1e-2"}  # by folder
UNEVEN, EVEN, FREE, TEXT = "#b5651d", "#2f6f9f", "#d9d9d9", "#333333"
EXPERTS_PER_RANK = 4

plt.rcParams.update({"font.size": 9, "text.color": TEXT, "axes.edgecolor": TEXT, "axes.labelcolor": TEXT})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"})


def _save(figure: plt.Figure, name: str) -> None:
    path = FIGURES / f"{name}.png"
    figure.savefig(path, dpi=110, facecolor="white", bbox_inches="tight")
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


# ---- what goes wrong without balancing ----


def _runs(folder: Path) -> dict[str, np.ndarray]:
    """Loads [steps, layers, experts] of each run."""
    loads = {}
    for name, strategy in STRATEGIES.items():
        if not (folder / name / "result.json").exists():
            command = ["train", "--out", folder / name, "--strategy", strategy, "--no-save-model", "--resume"]
            subprocess.run([sys.executable, "-m", "equipoise", *map(str, command)], check=True)
        table = read_records(folder / name).loads()
        sizes = [len(table.column(key).unique()) for key in ("step", "layer", "expert")]
        loads[name] = table.column("load").to_numpy().reshape(sizes)
    return loads


def without_balancing(folder: Path) -> None:
    loads = _runs(folder)
    labels = {"none": "without balancing", "lbl": "with a load-balancing loss"}
    colors = {"none": UNEVEN, "lbl": EVEN}
    figure, (steps, experts, ranks) = plt.subplots(1, 3, figsize=(9.6, 2.8), layout="constrained")
    for name, load in loads.items():
        maxvio = (load.max(-1) / load.mean(-1) - 1).mean(-1)
        steps.plot(maxvio, color=colors[name], label=labels[name])
        share = load[-8:, -1].sum(0) / load[-8:, -1].sum(0).mean()  # last layer, last tenth of the steps
        width, shift = 0.42, 0.21 if name == "lbl" else -0.21
        experts.bar(np.arange(share.size) + shift, np.sort(share)[::-1], width, color=colors[name])
        of_rank = share.reshape(-1, EXPERTS_PER_RANK).mean(-1)
        ranks.bar(np.arange(of_rank.size) + shift, of_rank, width, color=colors[name])
        ranks.axhline(of_rank.max(), color=colors[name], linewidth=1, linestyle=":")
        print(
            f"{name}: MaxVio of the last tenth of the steps {maxvio[-8:].mean():.2f}; last layer: "
            f"busiest expert {share.max():.2f}, idlest {share.min():.3f}, below a tenth {np.sum(share < 0.1)}, "
            f"dead {np.sum(share == 0)}, busiest rank {of_rank.max():.2f}"
        )
    for axes, even in ((experts, 1), (ranks, 1)):
        axes.axhline(even, color=TEXT, linewidth=0.8)
        axes.set_ylabel("load / even load")
    steps.set(title="MaxVio of the batch", xlabel="step", ylim=(0, None))
    steps.legend(frameon=False, fontsize=8)
    experts.set(title="load of each expert", xlabel="experts, busiest first", xticks=[])
    ranks.set(title=f"load of a rank with {EXPERTS_PER_RANK} experts", xlabel="rank")
    _save(figure, "without_balancing")


# ---- what each scope demands ----

SEQUENCES = [[4, 4, 0, 0], [4, 4, 0, 0], [0, 0, 4, 4], [0, 0, 4, 4]]  # specialised, and even over all of them
ROWS = ["maths, sequence 1", "maths, sequence 2", "code, sequence 1", "code, sequence 2"]


def _bars(axes: Axes, x: float, y: float, counts: Sequence[float], is_judged: bool) -> None:
    """Four bars with their counts. The dashed line is the even load that a scope demands."""
    mean, is_even = sum(counts) / len(counts), max(counts) == min(counts)
    color = FREE if not is_judged else EVEN if is_even else UNEVEN
    for expert, count in enumerate(counts):
        left = x + 0.08 + expert * 0.21
        axes.add_patch(Rectangle((left, y), 0.17, 0.22 * count / mean, color=color, linewidth=0))
        axes.text(left + 0.085, y - 0.17, f"{count}", ha="center", fontsize=8)
    axes.plot([x + 0.04, x + 0.92], [y] * 2, color=TEXT, linewidth=0.6)
    if is_judged:
        axes.plot([x + 0.04, x + 0.92], [y + 0.22] * 2, color=TEXT, linewidth=0.9, linestyle="--")


def scopes() -> None:
    """The counts of two micro-batches of one domain each, under the three scopes."""
    maths, code = np.sum(SEQUENCES[:2], 0), np.sum(SEQUENCES[2:], 0)
    of_sequences = [(y, *row, True) for y, row in zip((3, 2, 1, 0), zip(ROWS, SEQUENCES, strict=True), strict=True)]
    columns = {
        "sequence": of_sequences,
        "micro_batch": [(2.5, "micro-batch of maths", maths, True), (0.5, "micro-batch of code", code, True)],
        "global_batch": [
            (3, "micro-batch of maths", maths, False),
            (1.5, "micro-batch of code", code, False),
            (0, "both together", maths + code, True),
        ],
    }
    figure, axes = plt.subplots(figsize=(8.4, 4.0), layout="constrained")
    for column, (scope, rows) in enumerate(columns.items()):
        x = column * 1.75
        axes.text(x + 0.48, 4.1, scope, ha="center", weight="bold", family="DejaVu Sans Mono", fontsize=10)
        for y, name, counts, is_judged in rows:
            _bars(axes, x, y, counts, is_judged)
            axes.text(x + 0.48, y + 0.63, name, ha="center", fontsize=8)
    for column in range(2):
        axes.plot([column * 1.75 + 1.36] * 2, [-0.2, 4.0], color=FREE, linewidth=1)
    axes.set(xlim=(-0.15, 4.6), ylim=(-0.62, 4.35))
    axes.axis("off")
    caption = (
        "dashed: the even load     brown: the scope finds it uneven     blue: even     grey: the scope does not look"
    )
    axes.text(2.22, -0.58, caption, ha="center", fontsize=8)
    _save(figure, "scopes")


# ---- the order of events ----


def _box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 0.86) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, 0.42, boxstyle=style, facecolor=color, edgecolor="none"))
    dark = color in (EVEN, UNEVEN)
    axes.text(x + width / 2, y + 0.2, text, ha="center", va="center", color="white" if dark else TEXT, fontsize=8.5)


def order_of_events() -> None:
    """Which counts a backward knows: a window of three micro-batches, in three ways."""
    rows = [
        ("plain loop\npooling=window", ["F1", "B1", "F2", "B2", "F3", "B3"], ["1", "1 2", "1 2 3"]),
        ("forwards first\npooling=window", ["F1", "F2", "F3", "B3", "B2", "B1"], ["1 2 3", "1 2 3", "1 2 3"]),
        ("plain loop\npooling=previous", ["F1", "B1", "F2", "B2", "F3", "B3"], ["last", "last", "last"]),
    ]
    figure, axes = plt.subplots(figsize=(8.4, 3.3), layout="constrained")
    for row, (name, events, known) in enumerate(rows):
        y = 2.6 - 1.2 * row
        axes.text(-0.15, y + 0.2, name, ha="right", va="center", fontsize=8.5)
        backward = 0
        for position, event in enumerate(events):
            if event.startswith("F"):
                _box(axes, position, y, f"forward {event[1]}", FREE)
                continue
            complete = known[backward] == "1 2 3"
            _box(axes, position, y, f"backward {event[1]}", EVEN if complete else UNEVEN)
            counts = "last window" if known[backward] == "last" else known[backward].replace(" ", ", ")
            axes.text(position + 0.43, y - 0.17, f"f from {counts}", ha="center", fontsize=8)
            backward += 1
        _box(axes, 6.1, y, "optimizer, step()", FREE, width=1.25)
    axes.set(xlim=(-1.5, 7.5), ylim=(-0.6, 3.2))
    axes.axis("off")
    caption = "blue: the backward knows the counts of the whole window     brown: it does not"
    axes.text(3.4, -0.55, caption, ha="center", fontsize=8)
    _save(figure, "order_of_events")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    without_balancing(Path(sys.argv[1]))
    scopes()
    order_of_events()


if __name__ == "__main__":
    main()
