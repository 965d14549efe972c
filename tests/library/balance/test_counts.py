"""What a window counts: every training token once, nothing of evaluation or pauses."""

import pytest
import torch
from models import tiny_lm
from windows import (
    LAYERS,
    assert_tokens_counted,
    attach_tiny,
    clone_gradients,
    count_by_hand,
    load_sums,
    random_ids,
    record_calls,
)

from equipoise import EquipoiseError


def test_a_window_counts_every_training_token_once():
    model, balance = attach_tiny("loss-free:rate=0.1")
    calls = record_calls(model)
    assert load_sums(balance) == dict.fromkeys(LAYERS, 0)
    for seed in range(3):
        model(random_ids(seed=seed)).backward()
    assert load_sums(balance) == dict.fromkeys(LAYERS, 0), "load must be that of the last closed window"
    balance.step()
    assert_tokens_counted(balance, 3 * 14)
    for name in LAYERS:
        assert balance.load[name].dtype == torch.int64
        assert balance.load[name].tolist() == count_by_hand(calls[name])
    model(random_ids(rows=1)).backward()
    balance.step()
    assert_tokens_counted(balance, 7)


@pytest.mark.parametrize("strategy", ["none", "loss-free", "lbl", "loss-free+lbl:scope=sequence"])
def test_evaluation_and_pauses_do_not_count_in_the_middle_of_a_window(strategy):
    model, balance = attach_tiny(strategy)
    first = model(random_ids())
    model.eval()
    model(random_ids(seed=1))
    with torch.inference_mode():
        model(random_ids(seed=2))
    model.train()
    with balance.paused():
        model(random_ids(seed=3))
        with balance.paused():
            model(random_ids(seed=4))
        model(random_ids(seed=5))
    (first + balance.loss()).backward()
    balance.step()
    assert_tokens_counted(balance, 14)


def test_a_paused_or_evaluated_forward_has_a_plain_gradient():
    plain = tiny_lm()
    plain(random_ids()).backward()
    for mode in ("paused", "eval"):
        for checkpointing in (None, "non_reentrant", "reentrant"):
            model, balance = attach_tiny("loss-free+lbl:coefficient=5", checkpointing=checkpointing)
            if mode == "eval":
                model.eval()
                model(random_ids()).backward()
            else:
                with balance.paused():
                    loss = model(random_ids())
                    if checkpointing is not None:  # the recomputation must be paused like its forward
                        loss.backward()
                if checkpointing is None:
                    loss.backward()
            assert all(torch.equal(g, clone_gradients(plain)[n]) for n, g in clone_gradients(model).items()), (
                mode,
                checkpointing,
            )
            with pytest.raises(EquipoiseError, match="none was"):
                balance.step()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_counts_where_the_caller_says_so(mode):
    for strategy in ("loss-free:rate=0.1", "loss-free:rate=0.1+lbl"):
        model, balance = attach_tiny(strategy)
        with mode(), balance.counting():
            model(random_ids())
        (model(random_ids(seed=1)) + balance.loss()).backward()
        balance.step()
        assert_tokens_counted(balance, 28)
        model(random_ids())
        balance.loss()
        balance.step()
        assert balance.metrics()["tokens"] == 14
