"""``EquipoiseCallback`` on two ranks, DDP over gloo, against one process that has the micro-batches of both."""

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
        found = run_on_ranks(2, trainer_ranks.everything, folder)
    for each in found:
        assert not isinstance(each, str), each
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_ranks_give_the_gradient_the_biases_and_the_counts_of_one_process(case):
    """Label tokens of all ranks, of each rank, and the plain mean: with average_tokens_across_devices, without, and
    where the model is handed no num_items_in_batch."""
    name, exact, across = case
    expected = own_loop(family(name), rows(24), BOTH, exact=exact, across=across, ranks=2)
    for found in _on_two_ranks():
        gradients, biases, loads = found[case]
        assert len(gradients) == len(expected[0]) == 2
        for ours, theirs in zip(gradients, expected[0], strict=True):
            assert distance(ours, theirs) < 1e-6
        for ours, theirs in zip(biases + loads, expected[1] + expected[2], strict=True):
            assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)


def test_the_three_weighings_differ_so_the_test_can_fail():
    firsts = [
        own_loop(family("qwen3_moe"), rows(24), BOTH, exact=exact, across=across, ranks=2)[0][0]
        for _, exact, across in CASES[:3]
    ]
    assert min(distance(firsts[0], firsts[1]), distance(firsts[0], firsts[2]), distance(firsts[1], firsts[2])) > 1e-3


def test_two_ranks_that_resume_go_on_as_if_they_had_not_stopped():
    for found in _on_two_ranks():
        gradients, biases = found["resumed"]["whole"]
        rest, moved = found["resumed"]["resumed"]
        assert len(gradients) == 3 and len(rest) == 1
        assert distance(rest[0], gradients[2]) < 1e-6  # the first backward lays DDP's buckets out anew
        assert all(torch.equal(moved[0][layer], biases[2][layer]) for layer in biases[2])


def test_a_state_that_one_rank_lacks_is_an_error_on_both():
    first, second = (found["alone"] for found in _on_two_ranks())
    assert "on rank 1 of the group" in first and "save_on_each_node=True" in first
    assert "must hold equipoise_balance.pt" in second and "save_on_each_node=True" in second
