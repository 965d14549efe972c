"""Which attention is quicker in the lab's small models on a CPU? A training step of the default model, in turn.

    python benchmarks/attention.py    # writes benchmarks/results/attention.json

One thread, as `equipoise reproduce` runs. Steps of two runs that differ by nothing else, one after another, 15 of each
after two to warm up; the ratio is the median of the pairs' ratios, with its quartiles. The last line on stdout is the
result as JSON.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from equipoise_lab.records import write_json
from equipoise_lab.train.config import Train
from equipoise_lab.train.engine import reproducible
from equipoise_lab.train.loop import _Training
from equipoise_lab.train.run_folder import Nobody

STORED = Path(__file__).parent / "results" / "attention.json"
PAIRS, WARM_UP = 15, 2
KINDS = ("eager", "sdpa")


def measure(folder: Path) -> dict[str, list[float]]:
    """Seconds of every step, by kind of attention."""
    torch.set_num_threads(1)
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with reproducible():
        runs = {}
        for kind in KINDS:
            runs[kind] = _Training(Train(out=folder / kind, steps=PAIRS + WARM_UP, qk_norm=True), Nobody(), "")
            runs[kind].inner.set_attn_implementation(kind)
        for step in range(PAIRS + WARM_UP):
            for kind, run in runs.items():
                started = time.perf_counter()
                run._step(step)
                took[kind].append(time.perf_counter() - started)
    return {kind: seconds[WARM_UP:] for kind, seconds in took.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        took = measure(Path(name))
    ratios = [plain / fused for plain, fused in zip(*(took[kind] for kind in KINDS), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "command": "python benchmarks/attention.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "seconds": {kind: round(statistics.median(seconds), 3) for kind, seconds in took.items()},
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }
    write_json(STORED, result)
    print(f"a step takes {result['seconds']} s; plain over fused: {middle:.3f} ({low:.3f} to {high:.3f})")
    print(json.dumps(result))
