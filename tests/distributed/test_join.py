"""DDP's ``join``: a rank that leaves takes part in no collective of ours, so the others would wait for it."""

from functools import cache

import join_ranks
import pytest
from ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")
COUNTED = 2 * 14 * 2  # of one rank and window: layers, tokens, experts per token


@cache
def _on_two_ranks():
    return run_on_ranks(2, join_ranks.everything)


def _found(case):
    for found in _on_two_ranks():
        assert not isinstance(found, str), found
    return [found[case] for found in _on_two_ranks()]


@pytest.mark.parametrize("case", join_ranks.REFUSED)
def test_ranks_that_may_leave_are_refused_on_every_rank_in_the_first_forward(case):
    for said, counted in _found(case):
        assert said.startswith("EquipoiseError: every rank must have the same number of windows") and counted == 0


@pytest.mark.parametrize("case", join_ranks.ALLOWED)
def test_a_join_that_leaves_no_rank_alone_counts_every_rank(case):
    assert _found(case) == [("went on", 2 * 2 * COUNTED)] * 2


def test_a_rank_that_pools_with_nobody_may_leave():
    assert _found("each rank alone") == [("went on", (1 + rank) * COUNTED) for rank in range(2)]


def test_all_ranks_stop_with_the_first_where_the_join_says_so():
    for said, counted in _found("one stops"):
        assert "exhausted" in said and counted == 2 * COUNTED
