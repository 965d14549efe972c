"""What many ranks do to one window: unequal numbers of micro-batches, a rank without any, ranks that begin unequal."""

import pytest
from ranks import run_on_ranks
from unequal_ranks import everything


@pytest.mark.slow
def test_ranks_that_differ_raise_on_every_rank_and_hang_none():
    for rank, found in enumerate(run_on_ranks(2, everything)):
        assert not isinstance(found, str), found
        assert found[2, 2] == "went on"
        for counts in ((2, 3), (3, 2)):
            assert "closed it after 2 micro-batches, 1 rank(s) began micro-batch 3" in found[counts]
        for counts in ((1, 0), (0, 2)):
            assert ("none was" if counts[rank] == 0 else "on another rank one was not") in found[counts]
        for strategy in ("lbl+quantile", "lbl+loss-free:rule=sign,scope=micro_batch"):
            assert "closed it after 2 micro-batches, 1 rank(s) began micro-batch 3" in found[strategy]
        assert "must begin with the same offsets" in found["start"]
        assert found["others"] == "went on" if rank == 0 else "group must hold this rank" in found["others"]
