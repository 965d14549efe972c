"""``metrics()`` and ``load``: their values, and that they do not change later."""

import pytest
import reference
import torch
from models import EXPERTS, K
from windows import LAYERS, PADDING_MASK, attach_tiny, count_by_hand, loss_by_hand, random_ids, record_calls


def test_a_micro_batch_ends_with_loss_or_with_the_next_forward_if_nothing_has_a_loss():
    for strategy in ("none", "loss-free:rate=0.1", "lbl"):
        model, balance = attach_tiny(strategy)
        calls = record_calls(model)
        for seed in range(3):
            loss = model(random_ids(seed=seed))
            if strategy == "lbl":
                loss = loss + balance.loss()
            loss.backward()
        balance.step()
        metrics = balance.metrics()
        expected = [
            sum(reference.max_violation(count_by_hand([calls[name][i]])) for name in LAYERS) / 2 for i in range(3)
        ]
        assert metrics["maxvio_micro"] == pytest.approx(sum(expected) / 3, rel=1e-9), strategy


def test_metrics_equal_numbers_worked_by_hand():
    model, balance = attach_tiny("loss-free:rate=0.1,rule=sign+lbl:scope=micro_batch,coefficient=0.5")
    assert balance.metrics() == {}
    calls = record_calls(model)
    losses = []
    for seed in range(2):
        loss = model(random_ids(seed=seed), PADDING_MASK)
        losses.append(loss_by_hand(calls, {"micro_batch": 1.0}, mask=PADDING_MASK.reshape(-1).tolist()) / 2)
        (loss + balance.loss()).backward()
    balance.step()
    metrics = balance.metrics()
    counts = [count_by_hand(calls[name], [PADDING_MASK.reshape(-1).tolist()] * 2) for name in LAYERS]
    expected = {
        "maxvio_batch": sum(map(reference.max_violation, counts)) / 2,
        "maxvio_micro": sum(
            reference.max_violation(count_by_hand([call], [PADDING_MASK.reshape(-1).tolist()]))
            for name in LAYERS
            for call in calls[name]
        )
        / 4,
        "maxvio_floor": reference.sampling_floor(20, K, EXPERTS),
        "min_violation": sum(map(reference.min_violation, counts)) / 2,
        "coefficient_of_variation": sum(map(reference.coefficient_of_variation, counts)) / 2,
        "load_entropy": sum(map(reference.normalised_entropy, counts)) / 2,
        "dead_experts": sum(map(reference.dead_experts, counts)),
        "tokens": 20,
        "load_balancing_loss": sum(losses) / 2,
        "collectives": 0,
        "collective_bytes": 0,
        "bias_max": max(float(bias.abs().max()) for bias in balance.biases.values()),
    }
    assert metrics.keys() == expected.keys()
    assert all(type(value) in (float, int) for value in metrics.values())
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert 0.05 < metrics["bias_max"] < 0.2


def test_metrics_leave_out_what_a_strategy_does_not_have():
    model, balance = attach_tiny("none")
    model(random_ids())
    balance.step()
    assert "bias_max" not in balance.metrics() and "load_balancing_loss" not in balance.metrics()


def test_losses_of_one_name_are_told_apart():
    scopes = ("global_batch", "sequence", "sequence", "sequence")
    model, balance = attach_tiny("+".join(f"lbl:scope={scope}" for scope in scopes))
    (model(random_ids()) + balance.loss()).backward()
    balance.step()
    metrics = {name: value for name, value in balance.metrics().items() if name.startswith("load_balancing_loss")}
    assert list(metrics) == [f"load_balancing_loss{end}" for end in ("", "_sequence", "_sequence_2", "_sequence_3")]
    assert metrics["load_balancing_loss"] != metrics["load_balancing_loss_sequence"]
    assert metrics["load_balancing_loss_sequence"] == metrics["load_balancing_loss_sequence_3"]


def test_an_empty_micro_batch_does_not_lower_the_loss_metric():
    losses = []
    for masks in ([PADDING_MASK], [PADDING_MASK, torch.zeros_like(PADDING_MASK)]):
        model, balance = attach_tiny("lbl:scope=micro_batch")
        for mask in masks:
            (model(random_ids(), mask) + balance.loss()).backward()
        balance.step()
        losses.append(balance.metrics()["load_balancing_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_returned_tensors_do_not_change_later():
    model, balance = attach_tiny("loss-free:rate=0.1")
    model(random_ids())
    balance.step()
    load, biases, state = balance.load, balance.biases, balance.state_dict()
    load_before, biases_before = ({n: v.clone() for n, v in values.items()} for values in (load, biases))
    model(random_ids(rows=9))
    balance.step()
    for name in LAYERS:
        assert torch.equal(load[name], load_before[name]) and torch.equal(biases[name], biases_before[name])
        assert torch.equal(state["biases"][name], biases_before[name]) and torch.equal(
            state["load"][name], load_before[name]
        )
    first_load = balance.load[LAYERS[0]].clone()
    for returned in (balance.biases, balance.state_dict()["biases"], balance.state_dict()["load"]):
        returned[LAYERS[0]].zero_()
    assert balance.biases[LAYERS[0]].any() and torch.equal(balance.load[LAYERS[0]], first_load)
