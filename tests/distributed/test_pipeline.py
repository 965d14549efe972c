"""Pipeline stages, which never see the loss, against the same schedule by hand in one process."""

from functools import cache

import pipeline_ranks
import pytest
import torch
from models import K
from pipeline_ranks import CASES, LENGTH, MICRO_BATCHES, ROWS
from ranks import distance, run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@cache
def _on_two_ranks():
    return run_on_ranks(2, pipeline_ranks.everything)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_stages_count_move_and_differentiate_as_one_process(case):
    """Known defects 89, 97: a stage that finds out its shapes by a forward of its own does not count it."""
    for stage, expected in enumerate(pipeline_ranks.by_hand(case)):
        by_case = _on_two_ranks()[stage]
        assert not isinstance(by_case, str), by_case
        ours = by_case[case]
        assert ours["windows"] == 2
        assert ours["load"].keys() == expected["load"].keys()
        assert len(ours["load"]) == (0 if stage == 0 and case.dense_first else 1)
        for name, load in ours["load"].items():
            assert int(load.sum()) == K * MICRO_BATCHES * ROWS * LENGTH
            assert torch.equal(load, expected["load"][name])
            assert torch.equal(ours["biases"][name], expected["biases"][name])
            assert ours["biases"][name].any()
        assert distance(ours["gradients"], expected["gradients"]) < 1e-6


def test_the_reference_gradient_depends_on_the_schedule():
    """So the test above can tell a wrong order of backwards: in 1F1B the first ones do not know the whole window."""
    gpipe, one_f_one_b = (pipeline_ranks.by_hand(case) for case in CASES if case[1:] == (True, False, False))
    assert distance(gpipe[1]["gradients"], one_f_one_b[1]["gradients"]) > 1e-4
