"""How long does ``attach`` take on a large model? 64 layers of each main family, on the meta device.

    python benchmarks/attach.py    # writes benchmarks/results/attach.json

For each family it times the first attach of a process, which proves the router, and a later one, which reuses the
proof. It stores medians of five, in seconds of wall clock and of CPU time. The limit is 0.2 s of CPU time on one
thread. It excludes imports, and the time that other programs take on a shared machine.

The last line on stdout is the result as JSON.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import equipoise
from equipoise.routers import find
from equipoise_lab.records import write_json

STORED = Path(__file__).parent / "results" / "attach.json"
LAYERS, REPEATS, LIMIT = 64, 5, 0.2
FAMILIES = ("deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe", "afmoe", "ernie4_5_moe", "gpt_oss")
ALL_SPARSE = {"first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 63}


def build(family: str, layers: int = LAYERS) -> nn.Module:
    """A model without weights and with experts in every layer."""
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=layers)
    for name, value in ALL_SPARSE.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = ["sparse"] * layers
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def measure(family: str, layers: int = LAYERS, repeats: int = REPEATS) -> dict[str, Any]:
    """Median seconds of the first attach and of a later one."""
    model = build(family, layers)
    seconds: dict[str, list[tuple[float, float]]] = {"first": [], "later": []}
    for _ in range(repeats):
        find._PROOFS.clear()
        for attempt in seconds:
            wall, cpu = time.perf_counter(), time.process_time()
            balance = equipoise.attach(model, "loss-free")
            seconds[attempt].append((time.perf_counter() - wall, time.process_time() - cpu))
            assert len(balance.biases) == layers
            balance.detach()
    medians = {
        attempt: [statistics.median(values) for values in zip(*pairs, strict=True)]
        for attempt, pairs in seconds.items()
    }
    row: dict[str, Any] = {"family": family, "layers": layers}
    for attempt, (wall, cpu) in medians.items():
        row |= {f"{attempt}_seconds": round(wall, 3), f"{attempt}_cpu_seconds": round(cpu, 3)}
    return row


def main() -> None:
    torch.set_num_threads(1)
    measure("mixtral", layers=2)  # late imports happen here, not in the measurement
    rows = [measure(family) for family in FAMILIES]
    result = {
        "command": "python benchmarks/attach.py",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no accelerator; one thread",
        "versions": {name: importlib.metadata.version(name) for name in ("equipoise", "torch", "transformers")},
        "limit_cpu_seconds": LIMIT,
        "holds": all(row["first_cpu_seconds"] <= LIMIT for row in rows),
        "rows": rows,
    }
    write_json(STORED, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
