"""``EquipoiseCallback`` on two ranks (DDP over gloo) equals one process with the micro-batches of both."""

import tempfile
from functools import cache

import pytest
import torch
import trainer_ranks
from models import family
from ranks import distance, run_on_ranks
from trainer_ranks import BOTH, CASES, own_loop, rows

pytestmark = pytest.mark.xdist_group("ranks")


@cache
def _on_two_ranks():
    with tempfile.TemporaryDirectory() as folder:
        results = run_on_ranks(2, trainer_ranks.everything, folder)
    for result in results:
        assert not isinstance(result, str), result
    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_ranks_give_the_gradient_the_biases_and_the_counts_of_one_process(case):
    """Micro-batches weigh by the label tokens of all ranks (``average_tokens_across_devices``), by those of each rank
    (without it), or equally (the Trainer passes no ``num_items_in_batch``)."""
    name, by_label_tokens, across_ranks = case
    weights = dict(by_label_tokens=by_label_tokens, across_ranks=across_ranks)
    expected = own_loop(family(name), rows(24), BOTH, ranks=2, **weights)
    for results in _on_two_ranks():
        gradients, biases, loads = results[case]
        assert len(gradients) == len(expected[0]) == 2
        for ours, theirs in zip(gradients, expected[0], strict=True):
            assert distance(ours, theirs) < 1e-6
        for ours, theirs in zip(biases + loads, expected[1] + expected[2], strict=True):
            assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)


def test_the_three_weights_give_different_gradients():
    """Otherwise the test above could not fail."""
    first, second, third = (
        own_loop(family("qwen3_moe"), rows(24), BOTH, by_label_tokens=by_label_tokens, across_ranks=across, ranks=2)[0][
            0
        ]
        for _, by_label_tokens, across in CASES[:3]
    )
    assert min(distance(first, second), distance(first, third), distance(second, third)) > 1e-3


def test_resuming_on_two_ranks_equals_never_having_stopped():
    for results in _on_two_ranks():
        gradients, biases = results["resumed"]["whole"]
        resumed_gradients, resumed_biases = results["resumed"]["resumed"]
        assert len(gradients) == 3 and len(resumed_gradients) == 1
        # not equal bit for bit: DDP rebuilds its buckets after the first backward
        assert distance(resumed_gradients[0], gradients[2]) < 1e-6
        assert all(torch.equal(resumed_biases[0][layer], biases[2][layer]) for layer in biases[2])


def test_a_state_that_one_rank_lacks_is_an_error_on_both():
    first, second = (results["missing on rank 1"] for results in _on_two_ranks())
    assert "on rank 1 of the group" in first and "save_on_each_node=True" in first
    assert "must hold equipoise_balance.pt" in second and "save_on_each_node=True" in second
