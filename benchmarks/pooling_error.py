"""How wrong is the gradient of the load-balancing loss when f is known late? ``pooling=...`` of `lbl`, measured.

    python benchmarks/pooling_error.py           # trains and measures what runs/pooling_error lacks; results and figure
    python benchmarks/pooling_error.py --draw    # the figure again, from benchmarks/results/pooling_error.json

The lab's default model is trained with ``lbl:scope=global_batch``, all forwards first, on micro-batches of one domain
each and on shuffled ones. After 20 and after 200 of 220 steps the next windows are taken one by one, each with the
weights that training has there, and the gradient of the balancing loss alone (the task's loss times 0) is computed with

    exact           all forwards first: f is the window's
    window          a plain loop of forward and backward: f of the micro-batches of the window so far
    previous        f of the window before: what training counted there, with the weights of one step ago
    previous, held  f of the window before, counted anew with the weights of now: the window's part of that error
    micro_batch     scope=micro_batch: another loss, for comparison

and compared with the exact one: ``||g - exact|| / ||exact||`` and the cosine, for the routers' weights and for all
parameters. ``exact`` itself is compared with a second computation that shares no code with the library: count in a
first pass, differentiate the loss with that f in a second.

Training runs in the precision of the lab (bfloat16 autocast where the machine has it), the gradients in float32, so
that the difference is that of f. Everything is resumed: what lies in --work is not computed again.

The last line on stdout is the result as JSON. The figure needs playwright and /usr/bin/chromium.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: its threads shall not spin where cores are shared

import torch
from picture import photograph
from torch import Tensor, nn

import equipoise
from equipoise_lab.records import read_json, write_json
from equipoise_lab.train import checkpoint
from equipoise_lab.train.batches import Batches, MicroBatch
from equipoise_lab.train.config import Train
from equipoise_lab.train.data import load_corpus
from equipoise_lab.train.engine import learning_rate_at, machine, reproducible
from equipoise_lab.train.evaluate import language_model_loss
from equipoise_lab.train.models import build_model

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks" / "results" / "pooling_error.json"
FIGURE = ROOT / "docs" / "figures" / "pooling_error.png"
TRAINED_WITH = "lbl:scope=global_batch"
STEPS, POINTS = 220, (20, 200)
LARGEST = 1e-5  # relative distance of the exact gradient from the two passes
TEXTS = {"domain-pure": False, "shuffled": True}
WINDOW = "lbl:scope=global_batch,coefficient=1"
PREVIOUS = "lbl:scope=global_batch,coefficient=1,pooling=previous"
MICRO_BATCH = "lbl:scope=micro_batch,coefficient=1"
MODES = ("window", "previous", "previous, held", "micro_batch")
NAMES = {
    "window": "window, plain loop",
    "previous": "previous",
    "previous, held": "previous, weights held",
    "micro_batch": "scope micro_batch",
}
COLOURS = {"window": "#0072B2", "previous": "#D55E00", "previous, held": "#E69F00", "micro_batch": "#606060"}
Gradients = dict[str, Tensor]


class Training:
    """The loop of `equipoise train`, open between two steps."""

    def __init__(self, config: Train):
        self.config = config
        self.device, self.autocast = machine(config.dtype)
        corpus = load_corpus(
            None if config.data == "corpus" else config.data,
            vocab_size=config.vocab_size,
            sequence_length=config.sequence_length,
            progress=say,
        )
        self.batches = Batches(
            corpus,
            sequence_length=config.sequence_length,
            sequences_per_micro_batch=config.sequences,
            micro_batches_per_step=config.micro_batches,
            seed=config.seed,
            shuffled=config.shuffled,
        )
        self.model = build_model(config, corpus.vocab_size).to(self.device).train()
        self.balance = equipoise.attach(self.model, config.strategy)
        self.layers = list(self.balance.biases)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        other = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        facts = checkpoint.load_newest(config.out, self.model, self.optimizer, lambda step: self.balance, say)
        self.done = 0 if facts is None else facts["step"]

    def learning_rate(self) -> float:
        config = self.config
        return learning_rate_at(self.done, steps=config.steps, peak=config.learning_rate, warmup=config.warmup)

    def step(self) -> float:
        """One optimizer step; returns the mean loss of its micro-batches."""
        window = self.batches.window(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        losses, task = [], 0.0
        for micro_batch in window:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = language_model_loss(self.model, micro_batch.input_ids.to(self.device))
            task += float(loss.detach()) / len(window)
            losses.append((loss + self.balance.loss()) / len(window))
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balance.step()
        self.done += 1
        return task

    def save(self) -> None:
        checkpoint.save(self.config.out, self.done, self.model, self.optimizer, self.balance)

    def measure(self) -> dict[str, Any]:
        """The errors of the window that comes next, with the weights of now. Training does not notice."""
        model, state = self.model, self.balance.state_dict()
        self.balance.detach()
        window, before = self.batches.window(self.done), self.batches.window(self.done - 1)
        exact = gradients(model, WINDOW, window, forwards_first=True)
        found = {
            "window": gradients(model, WINDOW, window),
            "previous": gradients(model, PREVIOUS, window, state=state),
            "previous, held": gradients(model, PREVIOUS, window, before=before),
            "micro_batch": gradients(model, MICRO_BATCH, window),
        }
        parts = {"all parameters": list(exact), "routers": [f"{layer}.weight" for layer in self.layers]}
        parts |= {f"{layer}.weight": [f"{layer}.weight"] for layer in self.layers}
        second = two_pass(model, window, self.layers)
        errors = {
            mode: {part: distance(gradient, exact, names) for part, names in parts.items()}
            for mode, gradient in found.items()
        }
        self.balance = equipoise.attach(model, self.config.strategy)
        self.balance.load_state_dict(state)
        return {
            "step": self.done,
            "learning_rate": self.learning_rate(),
            "errors": errors,
            "check": {part: distance(exact, second, names)["error"] for part, names in parts.items()},
        }


def gradients(
    model: nn.Module,
    strategy: str,
    window: list[MicroBatch],
    *,
    forwards_first: bool = False,
    state: dict[str, Any] | None = None,
    before: list[MicroBatch] | None = None,
) -> Gradients:
    """Of the mean over micro-batches of the balancing loss, and of nothing else.

    The window before is taken from ``state``, or counted here, from ``before``.
    """
    device = next(model.parameters()).device
    balance = equipoise.attach(model, strategy)
    if state is not None:
        balance.load_state_dict(state)
    if before is not None:
        with torch.no_grad():
            for micro_batch in before:
                language_model_loss(model, micro_batch.input_ids.to(device))
                balance.loss()
        balance.step()
    losses = []
    for micro_batch in window:
        loss = 0.0 * language_model_loss(model, micro_batch.input_ids.to(device))
        loss = (loss + balance.loss()) / len(window)
        if forwards_first:
            losses.append(loss)
        else:
            loss.backward()
    if losses:
        torch.stack(losses).sum().backward()
    balance.step()
    balance.detach()
    return taken(model)


def two_pass(model: nn.Module, window: list[MicroBatch], layers: list[str]) -> Gradients:
    """The exact gradient once more, by the definition and without the library: a router's own logits and choices."""
    device = next(model.parameters()).device
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        model.get_submodule(layer).register_forward_hook(lambda module, inputs, out: seen.append((out[0], out[2])))
        for layer in layers
    ]
    counts: list[Any] = [0] * len(layers)
    with torch.no_grad():
        for micro_batch in window:
            seen.clear()
            model(input_ids=micro_batch.input_ids.to(device), use_cache=False)
            for index, (logits, expert_ids) in enumerate(seen):
                counts[index] = counts[index] + torch.bincount(expert_ids.flatten().cpu(), minlength=logits.shape[-1])
    for micro_batch in window:
        seen.clear()
        total = 0.0 * model(input_ids=micro_batch.input_ids.to(device), use_cache=False).logits.sum()
        for count, (logits, _) in zip(counts, seen, strict=True):
            scores = logits.sigmoid()
            p = (scores / scores.sum(-1, keepdim=True)).mean(0)
            f = (count / count.sum()).to(p)
            total = total + len(f) * (f * p).sum() / len(window)
        total.backward()
    for hook in hooks:
        hook.remove()
    return taken(model)


def taken(model: nn.Module) -> Gradients:
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(ours: Gradients, exact: Gradients, names: list[str]) -> dict[str, float]:
    """||ours - exact|| / ||exact|| and the cosine, of these parameters together."""
    mine, theirs = (torch.cat([gradient[name].flatten() for name in names]) for gradient in (ours, exact))
    return {
        "error": float((mine - theirs).norm() / theirs.norm()),
        "cosine": float(mine @ theirs / (mine.norm() * theirs.norm())),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_all(work: Path, num_windows: int) -> dict[str, Any]:
    """By text and number of steps, the errors of each window; trains as far as that needs."""
    found = {}
    for text, shuffled in TEXTS.items():
        files = {point: work / f"{text}-{point}.json" for point in POINTS}
        if not all(file.exists() for file in files.values()):
            with reproducible():
                folder = work / text
                _train_and_measure(
                    Train(out=folder, strategy=TRAINED_WITH, steps=STEPS, shuffled=shuffled), files, num_windows
                )
        found[text] = {point: read_json(file) for point, file in files.items()}
    return found


def _train_and_measure(config: Train, files: dict[int, Path], num_windows: int) -> None:
    training = Training(config)
    rows: list[dict[str, Any]] = []
    while not all(file.exists() for file in files.values()):
        point = max((point for point in files if point <= training.done), default=None)
        began = time.monotonic()
        if point is not None and not files[point].exists() and training.done < point + num_windows:
            rows.append(training.measure())
            if len(rows) == num_windows:
                write_json(files[point], rows)
                rows = []
            say(f"{config.out.name}: measured at step {training.done}, {time.monotonic() - began:.1f} s")
        loss = training.step()
        if training.done % 20 == 0:
            training.save()
            say(f"{config.out.name}: step {training.done}, loss {loss:.3f}, {time.monotonic() - began:.1f} s a step")


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is stored: means and standard deviations over the windows."""
    found = measure_all(arguments.work, arguments.windows)
    device, autocast = machine("auto")
    config = Train(out=arguments.work, strategy=TRAINED_WITH, steps=STEPS)
    left_out = ("shuffled", "evaluate_every", "evaluation_sequences", "checkpoint_every")
    windows = [window for points in found.values() for rows in points.values() for window in rows]
    check = max(value for window in windows for value in window["check"].values())
    if check > LARGEST:
        sys.exit(f"the exact gradient must be that of two passes up to {LARGEST}: it is {check} away")
    return {
        "command": shlex.join(["python", "benchmarks/pooling_error.py", *sys.argv[1:]]),
        "trained_with": TRAINED_WITH,
        "options": {name: value for name, value in config.shared().items() if name not in left_out},
        "windows": min(len(rows) for points in found.values() for rows in points.values()),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {device}; trained in "
        f"{'bfloat16 autocast' if autocast else 'float32'}, measured in float32",
        "versions": {
            "equipoise": equipoise.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
        "check": {
            "what": "largest relative distance of the exact gradient from two passes without the library",
            "error": check,
        },
        "results": [
            {"text": text, "step": point, "learning_rate": rows[0]["learning_rate"], "errors": _means(rows)}
            for text, points in found.items()
            for point, rows in points.items()
        ],
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By way and part: mean and standard deviation of the error and of the cosine, and each window's error."""
    means: dict[str, Any] = {}
    for mode, parts in rows[0]["errors"].items():
        means[mode] = {}
        for part in parts:
            errors = [row["errors"][mode][part]["error"] for row in rows]
            cosines = [row["errors"][mode][part]["cosine"] for row in rows]
            means[mode][part] = {
                "error": statistics.mean(errors),
                "error_deviation": statistics.stdev(errors) if len(errors) > 1 else None,
                "cosine": statistics.mean(cosines),
                "cosine_deviation": statistics.stdev(cosines) if len(cosines) > 1 else None,
                "errors": [round(error, 4) for error in errors],
            }
    return means


def table(stored: dict[str, Any]) -> str:
    lines = [
        "| micro-batches | step | f | error, routers | cosine | error, all parameters | cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in stored["results"]:
        for mode in MODES:
            cells = [
                f"{found[key]:.2f} ± {found[key + '_deviation'] or 0:.2f}"
                for found in (row["errors"][mode]["routers"], row["errors"][mode]["all parameters"])
                for key in ("error", "cosine")
            ]
            lines.append(f"| {row['text']} | {row['step']} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(stored: dict[str, Any]) -> None:
    """A panel a kind of micro-batch, a group of dots a step, a dot a way to know f."""
    from plotly.subplots import make_subplots

    titles = {"domain-pure": "Micro-batches of one domain each", "shuffled": "Shuffled micro-batches"}
    figure = make_subplots(
        cols=len(TEXTS), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[titles[text] for text in TEXTS]
    )
    height = len(MODES) + 1.4  # of a group: its heading and a line a way
    ticks: dict[float, str] = {}
    for row in stored["results"]:
        column = list(TEXTS).index(row["text"]) + 1
        top = POINTS.index(row["step"]) * height
        ticks[top] = f"<b>step {row['step']}</b>, learning rate {row['learning_rate']:.1g}"
        for line, mode in enumerate(MODES, 1):
            ticks[top + line] = NAMES[mode]
            routers, everything = row["errors"][mode]["routers"], row["errors"][mode]["all parameters"]
            colour = COLOURS[mode]
            figure.add_scatter(
                **{"x": [everything["error"]], "y": [top + line], "mode": "markers", "row": 1, "col": column},
                marker={"symbol": "circle-open", "size": 13, "color": colour, "line": {"width": 1.5}},
            )
            figure.add_scatter(
                **{"x": [routers["error"]], "y": [top + line], "mode": "markers", "row": 1, "col": column},
                marker={"size": 9, "color": colour},
                error_x={"array": [routers["error_deviation"] or 0], "color": colour, "thickness": 2, "width": 0},
            )
            text = f"<b>{routers['error']:.2f}</b>  cos {routers['cosine']:.2f}"
            figure.add_annotation(
                **{"text": text, "x": math.log10(7.5), "y": top + line, "xanchor": "left", "showarrow": False},
                **{"row": 1, "col": column},
            )
    figure.update_xaxes(
        type="log",
        range=[math.log10(0.07), math.log10(75)],
        tickvals=[0.1, 0.2, 0.5, 1, 2, 5],
        zeroline=False,
        title={"text": "‖g \u2212 exact‖ / ‖exact‖", "font": {"size": 14}},
    )
    figure.update_yaxes(
        range=[height * len(POINTS) - 0.8, -0.7],
        showgrid=False,
        zeroline=False,
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
    )
    figure.update_annotations(font={"size": 14})
    place = {"xref": "paper", "yref": "paper", "x": 1, "y": -0.23, "xanchor": "right", "yanchor": "bottom"}
    figure.add_annotation(
        text=f"dot: router weights, mean and standard deviation of {stored['windows']} windows; ring: all parameters",
        **{**place, "showarrow": False, "font": {"size": 13}},
    )
    figure.update_layout(
        template="plotly_white",
        width=900,
        height=420,
        margin={"l": 10, "r": 10, "t": 34, "b": 72},
        showlegend=False,
        font={"family": "DejaVu Sans, sans-serif", "size": 13, "color": "#202020"},
    )
    photograph(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/pooling_error"), help="folder of what is resumed")
    parser.add_argument("--windows", type=int, default=5, help="windows measured at each of the two points")
    parser.add_argument("--draw", action="store_true", help="only table and figure, from the stored result")
    arguments = parser.parse_args()
    if not arguments.draw:
        write_json(STORED, collect(arguments))
    stored = read_json(STORED)
    draw(stored)
    print(table(stored))
    summary = {
        f"{row['text']}, step {row['step']}": {m: round(row["errors"][m]["routers"]["error"], 4) for m in MODES}
        for row in stored["results"]
    }
    print(json.dumps({"check": stored["check"]["error"], "errors_of_routers": summary}))


if __name__ == "__main__":
    main()
