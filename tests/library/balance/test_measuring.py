"""``measuring()`` counts an evaluation and leaves the open window alone."""

import pytest
import torch
from models import K
from windows import LAYERS, assert_gradients_close, assert_tokens_counted, attach_tiny, clone_gradients, random_ids

import equipoise
from equipoise import EquipoiseError


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_measuring_counts_in_any_mode_and_leaves_the_window_alone(training, inference):
    model, balance = attach_tiny("loss-free:rate=0.1+lbl:coefficient=0.5")
    other, other_balance = attach_tiny("loss-free:rate=0.1+lbl:coefficient=0.5")
    loss = model(random_ids())
    model.train(training)
    with torch.inference_mode(inference), balance.measuring() as load:
        assert load == {}
        model(random_ids(seed=1))
        model(random_ids(seed=2, rows=3))
    model.train()
    assert {name: int(counts.sum()) for name, counts in load.items()} == dict.fromkeys(LAYERS, K * 35)
    (loss + balance.loss()).backward()
    (other(random_ids()) + other_balance.loss()).backward()
    for b in (balance, other_balance):
        b.step()
    for name in LAYERS:
        assert torch.equal(balance.load[name], other_balance.load[name])
        assert torch.equal(balance.biases[name], other_balance.biases[name])
    assert_gradients_close(clone_gradients(model), clone_gradients(other), 0)
    assert equipoise.metrics.max_violation(load) >= 0
    load[LAYERS[0]].add_(1)  # an ordinary tensor even after inference mode


def test_measuring_gives_zeros_without_a_forward_and_nothing_after_an_error():
    model, balance = attach_tiny("loss-free:rate=0.1")
    with balance.measuring() as load:
        pass
    assert {name: int(counts.sum()) for name, counts in load.items()} == dict.fromkeys(LAYERS, 0)
    with pytest.raises(ZeroDivisionError), balance.measuring() as load:
        model(random_ids())
        raise ZeroDivisionError
    assert load == {}
    with balance.measuring(), pytest.raises(EquipoiseError, match="must not be nested"), balance.measuring():
        pass
    model(random_ids())
    balance.step()
    assert_tokens_counted(balance, 14)


def test_a_paused_forward_is_not_measured():
    model, balance = attach_tiny("none")
    with balance.measuring() as load:
        model(random_ids())
        with balance.paused():
            model(random_ids())
    assert int(load[LAYERS[0]].sum()) == K * 14


def test_an_evaluation_inside_a_pause_is_measured():
    """The innermost of the two says what happens to a call."""
    model, balance = attach_tiny("loss-free:rate=0.1")
    model(random_ids())
    with balance.paused():
        model(random_ids())
        with balance.measuring() as load:
            model(random_ids(seed=1, rows=3))
        model(random_ids())
    balance.step()
    assert int(load[LAYERS[0]].sum()) == K * 21
    assert_tokens_counted(balance, 14)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_measuring_a_forward_and_backward_counts_once(checkpointing):
    model, balance = attach_tiny("loss-free:rate=0.1+lbl", checkpointing=checkpointing)
    with balance.measuring() as load:
        model(random_ids()).backward()
    assert int(load[LAYERS[0]].sum()) == K * 14
