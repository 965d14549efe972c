"""A replay on one rank holds the biases of all ranks, without a collective of its own."""

import pytest
import torch
from models import EXPERTS
from ranks import run_on_ranks
from replay_ranks import LOSS, record, replays_on_one_rank

pytestmark = pytest.mark.xdist_group("ranks")


def test_a_replay_on_one_rank_holds_the_biases_of_both():
    ranks = run_on_ranks(2, replays_on_one_rank)
    assert all(isinstance(rank, dict) for rank in ranks), ranks
    for loss in ("", LOSS):
        live, replayed, again = (step for step in ranks[0][loss])
        for step, other in zip(ranks[0][loss], ranks[1][loss], strict=True):
            assert all(torch.equal(step[name], other[name]) for name in step), "the ranks differ"
        names = [name for name in live if name != "load"]
        assert any(live[name].any() for name in names)
        assert all(torch.equal(live[name], replayed[name]) for name in names)
        assert any(not torch.equal(again[name], replayed[name]) for name in names)
        assert {int(step["load"].sum()) for step in ranks[0][loss]} == {2 * 4 * 2 * 16 * 2}
        own = torch.bincount(record(7)[:, :, 0].flatten(), minlength=EXPERTS)
        assert (replayed["load"][:EXPERTS] >= own).all()
