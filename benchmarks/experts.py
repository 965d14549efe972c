"""How fast is `equipoise.nn.MoE`? Forward and backward of one layer, beside Transformers and a dense layer.

    python benchmarks/experts.py    # writes benchmarks/results/experts.json

Each shape is measured in bfloat16 and in float32. The candidates are:

- ours;
- the block of Qwen3-MoE, under each way in which Transformers computes experts;
- the floor: one dense SwiGLU with as many operations as the experts of a token.

All route by the same router weights. The layers run in turn, and every call has new tokens and so new loads. Ratios are
medians over rounds, see paired.py. The memory allocator keeps its default settings. Targets: ours takes at most 0.9 of
the time of the best way of Transformers, and at most 1.5 times the time of the floor (in bfloat16 1.8 times). The last
line on stdout is the result as JSON.

Two other packages of experts are left out. MegaBlocks needs a GPU. st-moe-pytorch (last released in 2024) drops tokens
beyond a capacity, so it computes another function.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import in_turn, ratio, run_facts, stopwatch
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from equipoise.nn import MoE
from equipoise_lab.records import write_json

STORED = Path(__file__).parent / "results" / "experts.json"
SHAPES = ((256, 256, 16, 2, 4096), (256, 128, 64, 6, 4096), (512, 512, 32, 4, 2048), (1024, 512, 64, 8, 1024))
WAYS = ("eager", "batched_mm", "grouped_mm")
LIMIT = 0.9
DENSE_LIMITS = {"float32": 1.5, "bfloat16": 1.8}
WARM_UP = 2
CPU = torch.device("cpu")
MOST_BYTES = 3e9  # batched_mm gathers the weights of every assignment


class Dense(nn.Module):
    """A SwiGLU as wide as the k experts of a token together."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(dim, 2 * hidden) * 0.02)
        self.down = nn.Parameter(torch.randn(hidden, dim) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down


def stock(way: str, dim: int, hidden: int, experts: int, k: int) -> nn.Module:
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=dim,
        moe_intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=k,
        norm_topk_prob=True,
    )
    config._experts_implementation = way
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def layers(
    dim: int, hidden: int, experts: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device = CPU
) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours = MoE(dim, hidden, experts, k, score_function="softmax")
    by_name: dict[str, nn.Module] = {"ours": ours, "dense": Dense(dim, k * hidden)}
    for way in WAYS:
        if way == "batched_mm" and 3 * dim * hidden * k * tokens * dtype.itemsize > MOST_BYTES:
            continue  # does not fit; if it does, it is the slowest way
        by_name[way] = stock(way, dim, hidden, experts, k)
        by_name[way].gate.weight.data.copy_(ours.router.weight.data)
    return {name: layer.to(device, dtype) for name, layer in by_name.items()}


def step(layer: nn.Module, inputs: Sequence[torch.Tensor], gradient: torch.Tensor) -> Callable[[], None]:
    """A call that takes the next input, so that every call has other loads, as in training."""
    remaining = iter(inputs)

    def call() -> None:
        x = next(remaining)
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(gradient)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return call


def measure(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, rounds: int, device: torch.device = CPU
) -> dict[str, Any]:
    dim, hidden, experts, k, tokens = shape
    place = dict(dtype=dtype, device=device)
    inputs = [torch.randn(1, tokens, dim, **place, requires_grad=True) for _ in range(WARM_UP + rounds)]
    gradient = torch.randn(1, tokens, dim, **place)
    calls = {name: step(layer, inputs, gradient) for name, layer in layers(*shape, dtype, device).items()}
    seconds = in_turn(calls, rounds, WARM_UP, seconds_of=stopwatch(device))
    milliseconds = {name: 1000 * sorted(values)[len(values) // 2] for name, values in seconds.items()}
    best = min((name for name in seconds if name in WAYS), key=lambda name: milliseconds[name])
    return {
        "dim": dim,
        "hidden": hidden,
        "experts": experts,
        "k": k,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: round(value, 2) for name, value in milliseconds.items()},
        "best_stock": best,
        "ours_over_best_stock": ratio(seconds["ours"], seconds[best]),
        "ours_over_dense": ratio(seconds["ours"], seconds["dense"]),
        "best_stock_over_dense": ratio(seconds[best], seconds["dense"]),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    rounds = options.parse_args().rounds
    rows = []
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            rows.append(row := measure(shape, dtype, rounds))
            over, dense = row["ours_over_best_stock"], row["ours_over_dense"]
            print(
                f"D {row['dim']:4} F {row['hidden']:3} E {row['experts']:2} k {row['k']} T {row['tokens']} "
                f"{row['dtype']:8}  ours {row['milliseconds']['ours']:8.1f} ms  over {row['best_stock']:10} "
                f"{over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f})  over dense {dense['median']:.2f}",
                flush=True,
            )
    result = run_facts("python benchmarks/experts.py", "transformers") | {
        "limit": LIMIT,
        "holds": all(row["ours_over_best_stock"]["median"] <= LIMIT for row in rows),
        "dense_limits": DENSE_LIMITS,
        "dense_holds": all(row["ours_over_dense"]["median"] <= DENSE_LIMITS[row["dtype"]] for row in rows),
        "rows": rows,
    }
    write_json(STORED, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
