"""``EquipoiseCallback`` under TRL on two ranks (DDP over gloo), which have unequal tokens."""

from functools import cache

import pytest
import torch
import trl_ranks
from ranks import distance, run_on_ranks
from trl_runs import COEFFICIENT, label_tokens, model_for, route

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.filterwarnings("ignore")]


@cache
def _on_two_ranks():
    results = run_on_ranks(2, trl_ranks.everything)
    for result in results:
        assert not isinstance(result, str), result
    return results


def _weight(case, batch, of_rank, of_all):
    """What a micro-batch weighs in the mean over the ranks, by hand."""
    if not case.startswith("sft"):
        return 1 / len(of_rank) / 2
    if "each rank" in case:
        return label_tokens(batch) / sum(map(label_tokens, of_rank)) / 2
    return label_tokens(batch) / sum(map(label_tokens, of_all))


def _expected(case, by_rank):
    """The gradient of autograd in float64, and the counts by loops. f is of both ranks, up to the micro-batch."""
    model, total, so_far = model_for(trl_ranks.CASES[case][0]).double(), 0.0, {}
    of_all = [batch for batches in by_rank for batch in batches]
    for number in range(len(by_rank[0])):
        routed = [route(model, batches[number]) for batches in by_rank]
        for name in routed[0]:
            counts = [one[name][1] for one in routed] + [so_far.get(name, [0] * 8)]
            so_far[name] = [sum(numbers) for numbers in zip(*counts, strict=True)]
        for batches, layers in zip(by_rank, routed, strict=True):
            weight = _weight(case, batches[number], batches, of_all)
            for name, (probabilities, _) in layers.items():
                share = torch.tensor(so_far[name], dtype=torch.float64) / sum(so_far[name])
                total = total + weight * COEFFICIENT * 8 * (share * probabilities.mean(0)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}, so_far


@pytest.mark.parametrize("case", trl_ranks.CASES)
def test_two_ranks_with_unequal_tokens(case):
    results = [result[case] for result in _on_two_ranks()]
    by_rank = [result["batches"] for result in results]
    tokens = [[int(batch["attention_mask"].sum()) for batch in batches] for batches in by_rank]
    assert tokens[0] != tokens[1]
    expected, counts = _expected(case, by_rank)
    for result in results:
        assert {name: load.tolist() for name, load in result["load"].items()} == counts
        for name, load in counts.items():
            signs = [(sum(load) > 8 * number) - (sum(load) < 8 * number) for number in load]
            biases = torch.tensor([1e-2 * (sign - sum(signs) / 8) for sign in signs])
            torch.testing.assert_close(result["biases"][name], biases, rtol=0, atol=1e-7)
        assert distance({name: result["gradient"][name] for name in expected}, expected) < 1e-6
