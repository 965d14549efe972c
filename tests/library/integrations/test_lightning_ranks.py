"""``BalanceCallback`` on two ranks (DDP and FSDP2 over gloo) gives what one process gives in float64."""

import tempfile
from functools import cache

import lightning_ranks
import pytest
from lightning_ranks import LR, STRATEGIES
from plain_model import PlainNet, Reference, assert_biases, assert_counts, assert_gradient, batches
from ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@cache
def _results():
    with tempfile.TemporaryDirectory() as folder:
        return run_on_ranks(2, lightning_ranks.everything, folder)


def _on_two_ranks():
    for result in _results():
        assert not isinstance(result, str), result
    return _results()


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_with_unequal_tokens_give_what_one_process_gives(name, accumulated):
    """Each rank has four batches of its own. Both losses are averaged over the ranks."""
    data = batches(8)
    for results in _on_two_ranks():
        gradients, biases, loads = results[f"{name} {accumulated}"]
        reference = Reference(PlainNet(), LR)
        for step, start in enumerate(range(0, 4, accumulated)):
            window = [data[2 * m : 2 * m + 2] for m in range(start, min(start + accumulated, 4))]
            expected = reference.step(window, 1 / accumulated / 2)
            assert_gradient(gradients[step], expected)
            assert_counts(loads[step], reference.counts)
            assert_biases(biases[step], reference.biases)
        assert len(gradients) == len(biases) == step + 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_on_two_ranks_brings_the_state_back(name):
    """Four windows before it, one after it."""
    data = batches(8)
    reference = Reference(PlainNet(), LR)
    for window in (data[:2], data[2:4], data[:2], data[2:4]):
        reference.step([window], 1 / 2)
    saved = dict(reference.biases, **{name: list(bias) for name, bias in reference.biases.items()})
    expected = reference.step([data[:2]], 1 / 2)
    for results in _on_two_ranks():
        biases, resumed, gradient, num_windows = results[f"{name} resumed"]
        assert_biases(biases, saved)
        assert_gradient(gradient, expected)
        assert_biases(resumed, reference.biases)
        assert num_windows == 5


def test_two_forwards_of_one_training_step_under_ddp_are_two_forwards():
    """They are not taken for a block that runs twice over the same tokens."""
    first = [int(batch["attention_mask"].sum()) for batch in batches(8)[:2]]
    second = int(batches(1, seed=7)[0]["attention_mask"].sum())
    for rank, results in enumerate(_on_two_ranks()):
        assert results["two forwards"] == (sum(first) + 2 * second, first[rank] + second)
