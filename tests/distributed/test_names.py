"""Ranks find each other whatever each of them did before, and however torch names process groups."""

from functools import cache

import names_ranks
import pytest
import torch
from ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")
COUNTED = 2 * 14 * 2  # of one rank: layers, tokens, experts per token


@cache
def _on_three_ranks():
    return run_on_ranks(3, names_ranks.everything)


def _found(case):
    for found in _on_three_ranks():
        assert not isinstance(found, str), found
    return [found[case] for found in _on_three_ranks()]


@pytest.mark.parametrize("naming", names_ranks.NAMINGS)
def test_ranks_that_made_unequally_many_groups_attach_and_attach_again(naming):
    found = _found(naming)
    assert [rank["counts"] for rank in found] == [[3 * COUNTED] * 2] * 3
    for name, again in (rank["names"] for rank in found):
        assert (name, again) == tuple(found[0]["names"]) and name != again


@pytest.mark.parametrize("naming", names_ranks.NAMINGS)
def test_ours_has_the_backends_of_the_group_and_leaves_the_names_of_others_alone(naming):
    """torch 2.14 hashes a number that each new group of a rank moves on: ours do not, so later groups agree on it."""
    for rank in _found(naming):
        assert rank["made"] == 0
        assert len(set(rank["config"])) == 1


def test_a_bound_device_asks_nothing_of_the_ranks_outside():
    for rank, (counted, while_made, after) in enumerate(_found("bound")):
        assert (counted, while_made) == ((2 * COUNTED, [(None, None)]) if rank < 2 else (0, []))
        assert after == torch.device("cuda", rank)
