"""Writes the table of the tutorial on comparing, and the README's picture, from a folder of `equipoise compare`.

equipoise compare --out runs/demo
python benchmarks/demo.py runs/demo      # stores benchmarks/results/demo.json, writes the table and the picture
python benchmarks/demo.py runs/demo --picture-only
python benchmarks/demo.py --check        # fails if the table is not that of the stored result
"""

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from equipoise_lab.analysis import read_records
from equipoise_lab.analysis.figures import DIVERGING
from equipoise_lab.analysis.summary import COLUMNS
from equipoise_lab.train.config import Compare

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorials" / "compare.md"
PICTURE = ROOT / "docs" / "figures" / "demo.png"
MARKS = re.compile(r"(<!-- demo: .*? -->\n).*?(<!-- /demo -->)", re.DOTALL)
STORED = ROOT / "benchmarks" / "results" / "demo.json"
COLOURS = LinearSegmentedColormap.from_list("load", [tuple(stop) for stop in DIVERGING])
OVER_STEPS = {
    "none": "Without balancing: half of the experts get nothing",
    "loss-free:rate=1e-2": "With Loss-Free Balancing",
}
BY_DOMAIN = {
    "lbl:scope=micro_batch": "Loss over a micro-batch: domains share experts",
    "lbl:scope=global_batch": "Loss over the global batch: experts specialise",
}
FORMATS = {
    "maxvio_global": "{:.2f}",
    "maxvio_batch": "{:.2f}",
    "dead_experts": "{:.0f}",
    "domain_information_bits": "{:.2f}",
    "val_nats": "{:.3f}",
    "val_bits_per_byte": "{:.3f}",
    "tokens_per_second": "{:,.0f}",
}
TITLES = {column.key: column.title for column in COLUMNS}


def store(folder: Path) -> dict:
    config = json.loads(next(folder.glob("*/config.json")).read_text())
    stored = {
        "command": config["command"],
        "options": config["options"],
        "date": config["began"][:10],
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no accelerator",
        "versions": config["versions"],
        "results": json.loads((folder / "results.json").read_text()),
        "floor": json.loads((folder / "results.json").read_text())[0]["maxvio_floor"],
    }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    return stored


def table(stored: dict) -> str:
    titles = ["Strategy", *(TITLES[key] for key in FORMATS)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in stored["results"]:
        cells = [f"`{row['strategy']}`", *(text.format(row[key]) for key, text in FORMATS.items())]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    lines += [
        "",
        f"`{stored['command']}` on {stored['hardware']}, {stored['date']}, {versions}. The sampling floor of "
        f"MaxVio on the test text is {stored['floor']:.3f}.",
        "",
    ]
    return "\n".join(lines)


def picture(folder: Path) -> Figure:
    """Above: the load of the last layer over the steps. Below: which domain uses which expert after training."""
    records = read_records(folder)
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(1.1, 1))
    for axis, (strategy, title) in zip(axes[0], OVER_STEPS.items(), strict=True):
        steps, relative = last_layer(records.loads(), strategy, "step")
        order = np.argsort(-relative[len(relative) // 2 :].sum(0), kind="stable")
        _heat_map(axis, relative[:, order].T, title, extent=(steps[0] - 0.5, steps[-1] + 0.5, len(order), 0))
        axis.set(xlabel="step", ylabel="32 experts, busiest first", yticks=[])
    for axis, (strategy, title) in zip(axes[1], BY_DOMAIN.items(), strict=True):
        domains, relative = last_layer(records.experts(), strategy, "domain")
        order = sorted(range(relative.shape[1]), key=lambda e: (relative[:, e].argmax(), -relative[:, e].max()))
        image = _heat_map(axis, relative[:, order], title)
        axis.set(xlabel="32 experts, sorted by domain", xticks=[], yticks=range(len(domains)), yticklabels=domains)
        axis.tick_params(labelsize=8)
    bar = figure.colorbar(image, ax=axes, label="load, as a multiple of an even load", shrink=0.6)
    bar.set_ticks([0, 1, 2, 3, 4], labels=["0", "1", "2", "3", "4 or more"])
    return figure


def last_layer(rows: pa.Table, strategy: str, key: str) -> tuple[list[Any], np.ndarray]:
    """The values of ``key`` (steps or domains), and relative loads [values, experts] of the last layer; 1 is even."""
    rows = rows.filter(pc.equal(rows["strategy"], strategy))
    rows = rows.filter(pc.equal(rows["layer"], rows["layer"][-1]))
    values = pc.unique(rows[key]).to_pylist()
    load = rows["load"].to_numpy().reshape(len(values), -1).astype(float)
    return values, load * load.shape[1] / load.sum(1, keepdims=True)


def _heat_map(axis: Axes, relative: np.ndarray, title: str, **options: Any) -> Any:
    axis.set_title(title, loc="left", fontsize=10)
    colours = {"cmap": COLOURS, "vmin": 0, "vmax": 4}
    return axis.imshow(relative, aspect="auto", interpolation="nearest", **colours, **options)


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        stored = json.loads(STORED.read_text())
        if table(stored) not in PAGE.read_text(encoding="utf-8"):
            sys.exit(f"{PAGE.name} must have the table of benchmarks/results/demo.json: run benchmarks/demo.py FOLDER.")
        defaults = Compare(out=Path("runs/demo"))
        options = defaults.shared()  # an option newer than the result had its default then
        options |= {name: value for name, value in stored["options"].items() if name in options}
        if options != defaults.shared() or [r["strategy"] for r in stored["results"]] != list(defaults.strategies):
            sys.exit("benchmarks/results/demo.json must have the defaults of `equipoise compare`: run it again.")
        return
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["--picture-only"]):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    picture(folder).savefig(PICTURE, dpi=150)
    if len(sys.argv) == 3:
        return
    rows = table(store(folder))
    PAGE.write_text(MARKS.sub(lambda marks: marks[1] + rows + marks[2], PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
