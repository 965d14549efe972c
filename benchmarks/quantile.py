"""How many steps until the load is even? Quantile balancing against the rules of Loss-Free Balancing.

    python benchmarks/quantile.py                # trains what runs/quantile lacks, stores results and figure
    python benchmarks/quantile.py --draw         # the table and the figure again, from benchmarks/results/quantile.json

Even means: the median of ``maxvio_batch`` over the last 10 steps is below 0.25, so step 10 is the earliest that can be
found. A strategy that never gets there is given as "> N". The runs are those of `equipoise compare`: one model, its
weights, micro-batches and learning rate the same for every strategy. What is done already is not run again.

The number depends on the learning rate, which warms up and then falls until the last step: a bias is fitted to the
weights of the step before, and how even the load can be at all is decided by how far a step moves the routers. So the
same is asked beside it with the weights held: of a model that was trained for 80 steps without balancing, windows of
forwards alone, nothing moves but the biases.

The last line on stdout is the result as JSON. The figure needs playwright and /usr/bin/chromium.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from picture import photograph

from equipoise_lab.records import find_runs, read_json, write_json

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks" / "results" / "quantile.json"
FIGURE = ROOT / "docs" / "figures" / "quantile.png"
SPAN, THRESHOLD = 10, 0.25
OTHERS = (1.0, 0.5)  # thresholds that are given beside it
HELD_AFTER = 80  # steps, the lab's default, of the model whose weights are held
FACTOR = 3  # the claim: that many times fewer steps than the best rate of the sign rule
QUANTILE, SIGN = "quantile", ("loss-free:rate=1e-2", "loss-free:rate=3e-3", "loss-free:rate=1e-3")
STRATEGIES = (  # those of the claim first
    QUANTILE,
    *SIGN,
    "quantile:bins=0",
    "loss-free:rate=1e-2,rule=proportional",
    "loss-free:rate=1e-2,rule=rms",
    "loss-free:rate=1e-2,rule=momentum",
    "loss-free:rate=1e-2,rule=multiplicative",
)
LOOKS = {  # label, colour (Okabe and Ito), dash, width
    STRATEGIES[0]: ("quantile", "#D55E00", "solid", 3),
    STRATEGIES[1]: ("sign 1e-2", "#0072B2", "solid", 2.2),
    STRATEGIES[2]: ("sign 3e-3", "#56B4E9", "solid", 2.2),
    STRATEGIES[3]: ("sign 1e-3", "#808080", "solid", 2.2),
    STRATEGIES[4]: ("quantile, exact", "#000000", "dot", 2),
    STRATEGIES[5]: ("proportional 1e-2", "#009E73", "dash", 1.6),
    STRATEGIES[6]: ("rms 1e-2", "#CC79A7", "dash", 1.6),
    STRATEGIES[7]: ("momentum 1e-2", "#E69F00", "dash", 1.6),
    STRATEGIES[8]: ("multiplicative 1e-2", "#7A5195", "dashdot", 1.6),
}


def running_median(values: list[float], span: int = SPAN) -> list[float]:
    """The median of each step and the ``span - 1`` before it, from step ``span`` on.

    >>> running_median([4.0, 1.0, 3.0, 2.0], span=2)
    [2.5, 2.0, 2.5]
    """
    return [statistics.median(values[end - span : end]) for end in range(span, len(values) + 1)]


def steps_until(values: list[float], threshold: float = THRESHOLD, span: int = SPAN) -> int | None:
    """The first step, from 1, whose running median is below ``threshold``; None if none is.

    >>> steps_until([4.0, 0.1, 0.1, 4.0], span=2), steps_until([4.0, 1.0], span=2)
    (3, None)
    """
    below = (step for step, median in enumerate(running_median(values, span), span) if median < threshold)
    return next(below, None)


def share_after(values: list[float], threshold: float = THRESHOLD, span: int = SPAN) -> float | None:
    """The share of the later steps whose running median is below the threshold too: does balance hold?"""
    first = steps_until(values, threshold, span)
    later = [] if first is None else running_median(values, span)[first - span + 1 :]
    return sum(median < threshold for median in later) / len(later) if later else None


def train(arguments: argparse.Namespace) -> str:
    """Runs what is missing and returns the command."""
    command = ["equipoise", "compare", "--out", str(arguments.work), "--steps", str(arguments.steps)]
    command += ["--seeds", str(arguments.seeds), "--no-save-model", "--resume", "--strategies", *STRATEGIES]
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    if done.returncode != 0:  # it has said why
        sys.exit(done.returncode)
    return shlex.join(command)


def hold(work: Path, num_windows: int) -> list[dict[str, Any]]:
    """Balance with the weights held, for the strategies of the claim; stops soon after balance. Resumed by strategy."""
    trained = work / "held" / "none"
    command = ["train", "--out", str(trained), "--strategy", "none", "--steps", str(HELD_AFTER), "--resume"]
    done = subprocess.run([sys.executable, "-m", "equipoise", *command], stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(done.returncode)
    rows = []
    for strategy in (QUANTILE, *SIGN):
        file = work / "held" / f"{strategy.replace(':', '_')}.json"
        if not file.exists():
            print(f"weights held: {strategy}", file=sys.stderr, flush=True)
            write_json(file, _hold(trained / "model", strategy, num_windows))
        values = read_json(file)
        rows.append(
            {
                "strategy": strategy,
                "steps_until_balance": steps_until(values),
                "windows": num_windows,
                "maxvio_batch": [round(value, 4) for value in values],
            }
        )
    return rows


def _hold(folder: Path, strategy: str, num_windows: int) -> list[float]:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: its threads shall not spin where cores are shared
    import torch
    from transformers import AutoModelForCausalLM

    import equipoise
    from equipoise_lab.train.batches import Batches
    from equipoise_lab.train.config import Train
    from equipoise_lab.train.data import load_corpus

    config, values = Train(out=folder), []
    corpus = load_corpus(vocab_size=config.vocab_size, sequence_length=config.sequence_length)
    batches = Batches(
        corpus,
        sequence_length=config.sequence_length,
        sequences_per_micro_batch=config.sequences,
        micro_batches_per_step=config.micro_batches,
        seed=config.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    balance = equipoise.attach(model, strategy)
    with torch.no_grad():
        for step in range(num_windows):
            for micro_batch in batches.window(HELD_AFTER + step):
                model(input_ids=micro_batch.input_ids, use_cache=False)
                balance.loss()
            balance.step()
            values.append(balance.metrics()["maxvio_batch"])
            reached = steps_until(values)
            if reached is not None and len(values) == reached + SPAN:
                break
    return values


def collect(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """What is stored: by strategy and seed the steps until balance, and the curves."""
    runs = [run for run in find_runs(arguments.work) if run.config["strategy"] in STRATEGIES]
    runs.sort(key=lambda run: (STRATEGIES.index(run.config["strategy"]), run.config["seed"]))
    config, rows = runs[0].config, []
    held = hold(arguments.work, arguments.held)
    for run in runs:
        steps = list(run.rows("steps"))
        values = [step["maxvio_batch"] for step in steps]
        rows.append(
            {
                "strategy": run.config["strategy"],
                "seed": run.config["seed"],
                "steps_until_balance": steps_until(values),
                "share_of_later_steps": share_after(values),
                **{f"steps_until_{threshold:g}": steps_until(values, threshold) for threshold in OTHERS},
                "mean_over_steps": statistics.mean(values),
                "last": running_median(values)[-1],
                "val_nats": run.result["val_nats"],
                "maxvio_batch": [round(value, 4) for value in values],
            }
        )
    return {
        "command": shlex.join(["python", "benchmarks/quantile.py", *sys.argv[1:]]),
        "runs": command,
        "options": {name: value for name, value in config["options"].items() if name not in ("strategy", "seed")},
        "seeds": len({run.config["seed"] for run in runs}),
        "criterion": f"median of maxvio_batch over {SPAN} steps < {THRESHOLD}",
        "date": max(run.config["began"] for run in runs)[:10],
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {config['device']}, {config['dtype']} autocast",
        "versions": config["versions"],
        "floor": steps[-1]["maxvio_floor"],
        "claim": claim(rows, config["steps"]),
        "claim_with_weights_held": claim(held, arguments.held),
        "held": held,
        "results": rows,
    }


def claim(rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Quantile against the best rate of the sign rule, means over seeds. Who never got there counts as ``steps``."""
    means, reached = {}, {}
    for strategy in (QUANTILE, *SIGN):
        found = [row["steps_until_balance"] for row in rows if row["strategy"] == strategy]
        means[strategy] = statistics.mean(steps if value is None else value for value in found)
        reached[strategy] = None not in found
    best = min(SIGN, key=lambda strategy: means[strategy])
    factor = means[best] / means[QUANTILE]
    return {
        "text": f"quantile is even in at least {FACTOR} times fewer steps than the best of {', '.join(SIGN)}",
        "quantile_steps": means[QUANTILE],
        "best_sign": best,
        "best_sign_steps": means[best],
        "factor": round(factor, 2),
        "factor_is": "exact" if reached[QUANTILE] and reached[best] else "a bound",
        "holds": reached[QUANTILE] and factor >= FACTOR,
    }


def many(value: int | None, most: int) -> str:
    return f"> {most}" if value is None else str(value)


def table(stored: dict[str, Any]) -> str:
    lines = [
        "| strategy | steps until MaxVio < 0.25 | < 0.5 | < 1 | mean of all steps | last 10 | weights held: steps |",
        "|---|---|---|---|---|---|---|",
    ]
    held = {row["strategy"]: many(row["steps_until_balance"], row["windows"]) for row in stored["held"]}
    for strategy in STRATEGIES:
        rows = [row for row in stored["results"] if row["strategy"] == strategy]
        counts = [
            ", ".join(many(row[key], stored["options"]["steps"]) for row in rows)
            for key in ("steps_until_balance", "steps_until_0.5", "steps_until_1")
        ]
        means = [statistics.mean(row[key] for row in rows) for key in ("mean_over_steps", "last")]
        lines.append(
            f"| `{strategy}` | {' | '.join(counts)} | {means[0]:.2f} | {means[1]:.2f} | {held.get(strategy, '')} |"
        )
    return "\n".join(lines)


def spread(places: list[float], gap: float) -> list[float]:
    """Places, moved as little as simple steps allow so that no two are closer than ``gap``.

    >>> spread([0.0, 0.1, 5.0], gap=1.0)
    [-0.45, 0.55, 5.0]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        groups.append([index])
        while len(groups) > 1 and _from(places, groups[-1], gap) < _from(places, groups[-2], gap) + gap * len(
            groups[-2]
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(places)
    for group in groups:
        for place, index in enumerate(group):
            moved[index] = round(_from(places, group, gap) + place * gap, 9)
    return moved


def _from(places: list[float], group: list[int], gap: float) -> float:
    """Where a group that stands ``gap`` apart begins, so that its middle stays."""
    return statistics.mean(places[i] for i in group) - gap * (len(group) - 1) / 2


def draw(stored: dict[str, Any]) -> None:
    """The running median of seed 0, one line a strategy, named at its end."""
    import plotly.graph_objects as go

    rows = {row["strategy"]: row for row in stored["results"] if row["seed"] == 0}
    last, figure = stored["options"]["steps"], go.Figure()
    ends = []
    for strategy in reversed([s for s in STRATEGIES if s in rows]):
        _, colour, dash, width = LOOKS[strategy]
        y = running_median(rows[strategy]["maxvio_batch"])
        x = list(range(SPAN, SPAN + len(y)))
        figure.add_scatter(x=x, y=y, mode="lines", line={"color": colour, "dash": dash, "width": width})
        first = rows[strategy]["steps_until_balance"]
        if first is not None:
            at = {"color": colour, "size": 9, "line": {"color": "white", "width": 1.5}}
            figure.add_scatter(x=[first], y=[y[first - SPAN]], mode="markers", marker=at)
        ends.append((strategy, math.log10(y[-1])))
    for level, text in (
        (THRESHOLD, f"even: below {THRESHOLD}"),
        (stored["floor"], f"sampling floor {stored['floor']:.3f}"),
    ):
        line = {"color": "#606060", "width": 1, "dash": "dot"}
        figure.add_shape(type="line", x0=0, x1=last, y0=level, y1=level, line=line)
        place = {"x": SPAN, "y": math.log10(level), "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(text=text, showarrow=False, font={"size": 13}, **place)
    values = [math.log10(value) for row in rows.values() for value in running_median(row["maxvio_batch"])]
    low, high = math.log10(stored["floor"]) - 0.06, max(values) + 0.08
    gap = (high - low) * 20 / 420  # a line of text in the plot's height
    places = spread([end for _, end in ends], gap)
    low = min(low, min(places) - gap / 2)
    for (strategy, end), place in zip(ends, places, strict=True):
        label, colour, dash, _ = LOOKS[strategy]
        steps = many(rows[strategy]["steps_until_balance"], last).replace("> ", ">\u2009")
        leader = {"color": colour, "width": 1.5, "dash": dash}
        figure.add_shape(type="line", x0=last, x1=last * 1.045, y0=10**end, y1=10**place, line=leader)
        place = {"x": last * 1.05, "y": place, "xanchor": "left"}
        figure.add_annotation(text=f"{label}: <b>{steps}</b>", showarrow=False, **place)
    place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1.01, "xanchor": "right", "yanchor": "bottom"}
    figure.add_annotation(text="rule and rate: <b>steps until even</b>", showarrow=False, **place)
    figure.update_layout(
        template="plotly_white",
        width=900,
        height=500,
        margin={"l": 58, "r": 14, "t": 30, "b": 50},
        showlegend=False,
        font={"family": "DejaVu Sans, sans-serif", "size": 14, "color": "#202020"},
        xaxis={
            "title": {"text": "step", "font": {"size": 14}},
            "range": [SPAN - 2, last * 1.36],
            "tickvals": list(range(20, last + 1, 20)),
            "zeroline": False,
        },
        yaxis={
            "title": {"text": "MaxVio of a step's batch, median of 10 steps", "font": {"size": 14}},
            "type": "log",
            "range": [low, high],
            "tickvals": [0.05, 0.1, 0.2, 0.5, 1, 2, 5],
        },
    )
    photograph(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/quantile"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps a run")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds; the figure shows the first")
    parser.add_argument("--held", type=int, default=120, help="windows with the weights held, at most")
    parser.add_argument("--draw", action="store_true", help="only table and figure, from the stored result")
    arguments = parser.parse_args()
    if not arguments.draw:
        write_json(STORED, collect(arguments, train(arguments)))
    stored = read_json(STORED)
    draw(stored)
    print(table(stored))
    last = {f"{row['strategy']}, seed {row['seed']}": row["steps_until_balance"] for row in stored["results"]}
    held = {row["strategy"]: row["steps_until_balance"] for row in stored["held"]}
    claims = {name: stored[name] for name in ("claim", "claim_with_weights_held")}
    print(json.dumps({"steps_until_balance": last, "with_weights_held": held, **claims}))


if __name__ == "__main__":
    main()
