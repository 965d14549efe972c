"""One table: however a window is dealt to ranks and wrappers, it gives the counts, biases and gradient of one process.

{2, 4 ranks} x {DDP, FSDP2} x {even, uneven, one rank with padding only} x {sequence, micro-batch, global batch}
x {loss-free, quantile, lbl, composed} x {plain, checkpointed}, one spawn for each number of ranks. That one process is
right is the matter of ``test_grid.py``.
"""

import itertools
from functools import cache

import pytest
import table_ranks
import torch
from ranks import distance, run_on_ranks
from table_ranks import CELLS, TWENTY

pytestmark = pytest.mark.xdist_group("ranks")
SIZES = (2, 4)


@cache
def _on_ranks(size):
    return run_on_ranks(size, table_ranks.everything, size)


@cache
def _attached_alone(cell):
    return table_ranks.attached(cell)


@cache
def _alone(cell, size):
    return table_ranks.run(cell, _attached_alone(cell._replace(wrapper="none", data="")), size, None)


def _name(cell):
    return "-".join(map(str, cell)) if isinstance(cell, tuple) else str(cell)


@pytest.mark.parametrize(("size", "cell"), list(itertools.product(SIZES, CELLS)), ids=_name)
def test_ranks_give_what_one_process_gives(size, cell):
    expected = _alone(cell._replace(wrapper="none"), size)
    for found in _on_ranks(size):
        assert not isinstance(found, str), found
        found = found[cell]
        assert found.counts == expected.counts
        assert all(map(torch.equal, found.biases, expected.biases))
        assert distance(found.gradients, expected.gradients) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_the_counts_of_a_window_without_a_loss_are_pooled_once_in_eight_bytes_each(size):
    for cell in CELLS:
        if cell.mechanism == "loss-free" and cell.scope == "global_batch":
            assert [found[cell].traffic for found in _on_ranks(size)] == [(1, 8 * 2 * 6)] * size


def test_one_process_has_no_traffic_and_the_biases_move():
    for mechanism in ("loss-free", "quantile", "composed"):
        cell = next(c for c in CELLS if c.mechanism == mechanism and c.scope == "global_batch")
        alone = _alone(cell._replace(wrapper="none"), 2)
        assert alone.traffic == (0, 0)
        for moved, start in zip(alone.biases, table_ranks.BIASES.values(), strict=True):
            assert not torch.equal(moved, start)


@cache
def _twenty_alone(strategy, size):
    return table_ranks.twenty_steps(strategy, "none", size, None)


@pytest.mark.parametrize(("size", "strategy", "wrapper"), list(itertools.product(SIZES, TWENTY, ("ddp", "fsdp"))))
def test_twenty_steps_in_float64_have_equal_counts(size, strategy, wrapper):
    expected = _twenty_alone(strategy, size)
    for found in _on_ranks(size):
        found = found[strategy, wrapper]
        assert found["counts"] == expected["counts"]
        assert all(map(torch.equal, found["biases"], expected["biases"]))
        assert float((found["weights"] - expected["weights"]).norm() / expected["weights"].norm()) < 1e-12


def test_twenty_steps_change_what_is_counted():
    counts = _twenty_alone(TWENTY[0], 2)["counts"]
    assert len({str(step) for step in counts}) == 20
