"""How much of a window must quantile balancing look at? What it adds to histograms, against how it evens the load.

    python benchmarks/sample.py    # writes benchmarks/results/sample.json

Routers whose logits are normal, and whose experts differ in their mean, choose for new tokens in every window. Nothing
trains. A histogram gets E additions for each token that is looked at. The script compares samples of the tokens with
the margins of the best experts of all tokens: a token says nothing of experts far from being chosen, so these count
as beyond the last bin. MaxVio of a window's load: until it is below 0.25, and in the last windows.

The last line on stdout is the result as JSON.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from paired import run_facts
from torch import Tensor

from equipoise.balancers import LayerStack, Quantile
from equipoise.balancers.quantile import _Bins, _margins
from equipoise.load import expert_load
from equipoise.metrics import max_violation
from equipoise.routing import Routing, ScoreFunction, route
from equipoise_lab.records import write_json

STORED = Path(__file__).parent / "results" / "sample.json"
EXPERTS, K, TOKENS = 128, 8, 8192
WINDOWS, LAST, SEEDS, EVEN = 40, 10, 4, 0.25
FRACTIONS = (1.0, 1 / 4, 1 / 16, 1 / 64)
BEST = (16, 32)  # experts of a token whose margins are looked at
SCORE_FUNCTIONS: tuple[ScoreFunction, ...] = ("softmax", "sigmoid")


def histogram_of_best(routing: Routing, bias: Tensor, best: int) -> Tensor:
    """The histogram of the margins of each token's ``best`` first experts; all others are in the last bin."""
    margins = _margins(routing.scores, routing.expert_ids, bias)
    smallest = margins.topk(best, largest=False)
    bins = _Bins.on(margins.device, 128).of(smallest.values)
    cells = (bins * EXPERTS + smallest.indices).flatten()
    histogram = torch.zeros(128 * EXPERTS, dtype=torch.int64).scatter_add_(0, cells, torch.ones_like(cells))
    histogram = histogram.view(128, EXPERTS)
    histogram[-1] += len(margins) - histogram.sum(0)
    return histogram


def violations(score_function: ScoreFunction, fraction: float, best: int, seed: int) -> list[float]:
    """MaxVio of each window."""
    generator = torch.Generator().manual_seed(seed)
    preference = torch.randn(EXPERTS, generator=generator)
    balancer = Quantile(fraction=fraction)
    balancer.prepare(LayerStack(score_function, K, torch.zeros(1, EXPERTS)))
    by_window = []
    for window in range(WINDOWS):
        logits = torch.randn(TOKENS, EXPERTS, generator=generator) + preference
        bias = balancer.bias()[0]
        routing = route(logits, K, score_function=score_function, bias=bias)
        load = expert_load(routing.expert_ids, EXPERTS)
        by_window.append(float(max_violation(load)))
        statistic = histogram_of_best(routing, bias, best) if best else balancer.statistic(routing, 0)
        balancer.update(load[None], [statistic], window)
    return by_window


def measure(score_function: ScoreFunction, fraction: float = 1.0, best: int = 0) -> dict[str, Any]:
    by_seed = [violations(score_function, fraction, best, seed) for seed in range(SEEDS)]
    first = [next((i for i, value in enumerate(by_window) if value < EVEN), WINDOWS) for by_window in by_seed]
    return {
        "score_function": score_function,
        "fraction": fraction,
        "best": best or None,
        "additions_by_token": fraction * (best or EXPERTS),
        "windows_until_even": statistics.median(first),  # the number of windows if it never is
        "last_violation": statistics.mean(value for by_window in by_seed for value in by_window[-LAST:]),
    }


def main() -> None:
    rows = [measure(name, fraction) for name in SCORE_FUNCTIONS for fraction in FRACTIONS]
    rows += [measure(name, best=best) for name in SCORE_FUNCTIONS for best in BEST]
    for row in rows:
        print(row)
    sizes = {"experts": EXPERTS, "k": K, "tokens": TOKENS, "windows": WINDOWS, "seeds": SEEDS, "even": EVEN}
    result = run_facts("python benchmarks/sample.py", "torch") | sizes | {"rows": rows}
    write_json(STORED, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
