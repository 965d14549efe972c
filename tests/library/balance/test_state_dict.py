"""``state_dict()`` and ``load_state_dict()``."""

import copy
import pickle

import pytest
import torch
from models import EXPERTS
from windows import LAYERS, assert_gradients_close, attach_tiny, clone_gradients, random_ids

import equipoise
from equipoise import EquipoiseError, UsageError

STRATEGY = "loss-free:rate=0.1+lbl:coefficient=0.5,pooling=previous"


def test_a_loaded_state_resumes_as_if_never_stopped(tmp_path):
    model, balance = attach_tiny(STRATEGY)
    for seed in range(2):
        (model(random_ids(seed=seed)) + balance.loss()).backward()
        balance.step()
        model.zero_grad()
    torch.save(balance.state_dict(), tmp_path / "state.pt")
    resumed_model, resumed = attach_tiny(STRATEGY)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.metrics()["maxvio_batch"] == balance.metrics()["maxvio_batch"]
    for trained, trained_balance in ((model, balance), (resumed_model, resumed)):
        (trained(random_ids(seed=5)) + trained_balance.loss()).backward()
        trained_balance.step()
    assert_gradients_close(clone_gradients(resumed_model), clone_gradients(model), 0)
    for name in LAYERS:
        assert torch.equal(resumed.load[name], balance.load[name])
        assert torch.equal(resumed.biases[name], balance.biases[name])
    assert torch.equal(resumed_model.blocks[0].gate.e_score_correction_bias, resumed.biases[LAYERS[0]])
    first, second = balance.state_dict(), resumed.state_dict()
    assert first["num_windows"] == second["num_windows"] == 3


def test_a_fresh_state_round_trips():
    _, balance = attach_tiny(STRATEGY)
    _, other = attach_tiny(STRATEGY)
    other.load_state_dict(balance.state_dict())
    assert other.metrics() == {}


def _window(model, balance, between=lambda: None):
    """Two micro-batches and a step; ``between`` is called after each forward, loss and backward."""
    for seed in (3, 4):
        output = model(random_ids(seed=seed))
        between()
        loss = output + balance.loss()
        between()
        loss.backward()
        between()
    balance.step()


@pytest.mark.parametrize(
    "strategy", ["loss-free:rule=momentum,rate=0.1", "quantile", STRATEGY, "loss-free:rate=0.1+lbl", "lbl"]
)
def test_a_state_within_a_window_is_that_of_the_last_one_and_disturbs_nothing(strategy, caplog):
    (model, balance), (undisturbed, expected) = attach_tiny(strategy), attach_tiny(strategy)
    for trained, its_balance in ((model, balance), (undisturbed, expected)):
        _window(trained, its_balance)
    before, within = balance.state_dict(), []
    caplog.clear()
    _window(model, balance, lambda: within.append(balance.state_dict()))
    _window(undisturbed, expected)
    assert len(within) == 6
    for state in within:
        assert_equal_states(state, before)
    assert_equal_states(balance.state_dict(), expected.state_dict())
    assert_gradients_close(clone_gradients(model), clone_gradients(undisturbed), 0)
    assert balance.metrics() == expected.metrics()
    (record,) = caplog.records  # said once
    assert record.name == "equipoise" and record.message.startswith("state_dict: 1 micro-batch(es) were counted since")
    assert "left out of the state" in record.message


def assert_equal_states(state, expected):
    assert state.keys() == expected.keys()
    for key in ("strategy", "num_windows", "multiplies"):
        assert state[key] == expected[key]
    parts = {"biases": state["biases"], "load": state["load"], **state["state"]}
    for key, part in parts.items():
        other = expected[key] if key in ("biases", "load") else expected["state"][key]
        assert part.keys() == other.keys() == set(LAYERS)
        assert all(torch.equal(part[name], other[name]) for name in part), key


def test_a_training_resumes_from_a_state_within_a_window():
    """As Lightning saves with ``val_check_interval=3`` and two micro-batches a step: what is open is dropped."""
    model, balance = attach_tiny(STRATEGY)
    _window(model, balance)
    model(random_ids(seed=8))
    balance.loss()
    state = balance.state_dict()
    resumed_model, resumed = attach_tiny(STRATEGY)
    resumed.load_state_dict(state)
    uninterrupted_model, uninterrupted = attach_tiny(STRATEGY)
    _window(uninterrupted_model, uninterrupted)
    uninterrupted_model.zero_grad()
    for trained, its_balance in ((resumed_model, resumed), (uninterrupted_model, uninterrupted)):
        _window(trained, its_balance)
    assert_equal_states(resumed.state_dict(), uninterrupted.state_dict())
    assert_gradients_close(clone_gradients(resumed_model), clone_gradients(uninterrupted_model), 0)


def test_a_state_of_the_first_window_is_that_of_an_attached_model(caplog):
    model, balance = attach_tiny("loss-free:rule=momentum")
    before = balance.state_dict()
    assert not caplog.records
    model(random_ids())
    assert_equal_states(balance.state_dict(), before)
    other_model, other = attach_tiny("loss-free:rule=momentum")
    other_model(random_ids())
    other.state_dict()
    assert len(caplog.records) == 2  # once for each Balance


def test_a_state_is_not_loaded_within_a_window():
    for strategy in ("loss-free", "lbl"):
        model, balance = attach_tiny(strategy)
        state = balance.state_dict()
        model(random_ids())
        for _ in range(2):
            with pytest.raises(EquipoiseError, match="between windows"):
                balance.load_state_dict(state)
            balance.loss()
        balance.step()
        balance.load_state_dict(state)


def _damaged_states(state):
    renamed = {f"x.{name}": value for name, value in state["biases"].items()}
    fewer = {LAYERS[0]: state["biases"][LAYERS[0]]}
    longer = {name: torch.zeros(EXPERTS + 1) for name in LAYERS}
    yield "renamed", state | {"biases": renamed}
    yield "fewer", state | {"biases": fewer}
    yield "longer", state | {"biases": longer}
    yield "last longer", state | {"biases": {**state["biases"], LAYERS[1]: torch.zeros(EXPERTS + 2)}}
    yield "wrong load", state | {"load": longer}
    yield "empty", {}
    yield "two-dimensional", state | {"biases": {name: torch.ones(EXPERTS, EXPERTS) for name in LAYERS}}
    yield "lists", state | {"biases": {name: [0.0] * EXPERTS for name in LAYERS}}
    yield "no tensors by name", state | {"load": torch.zeros(EXPERTS)}
    yield "no moving parts", state | {"state": None}
    yield "no number", {key: value for key, value in state.items() if key != "num_windows"}


def test_the_state_of_another_model_is_refused_before_anything_moves():
    model, balance = attach_tiny("loss-free:rate=0.1")
    model(random_ids())
    balance.step()
    state = balance.state_dict()
    moved = state | {"biases": {name: bias + 1 for name, bias in state["biases"].items()}}
    for case, wrong in _damaged_states(moved):
        with pytest.raises(EquipoiseError, match="the state must"):
            balance.load_state_dict(wrong)
        for name in LAYERS:
            assert torch.equal(balance.biases[name], state["biases"][name]), case
            assert torch.equal(balance.load[name], state["load"][name]), case


def test_a_balance_is_saved_as_its_state_and_in_no_other_way(tmp_path):
    _, balance = attach_tiny("loss-free")
    for save in (copy.deepcopy, pickle.dumps, lambda b: torch.save({"app": {"balance": b}}, tmp_path / "state.pt")):
        with pytest.raises(TypeError, match=r"must be saved as its state: .* Save balance\.state_dict\(\)"):
            save(balance)


def test_biases_by_layer_know_whether_they_are_factors(tmp_path):
    """Switching strategy by ``biases=balance.detach()`` must not take what was added for what multiplies."""
    model, balance = attach_tiny("loss-free:rate=0.1")
    model(random_ids())
    balance.step()
    biases = balance.detach()
    fresh = attach_tiny("none")
    fresh[1].detach()
    with pytest.raises(UsageError, match="these are added to the scores"):
        equipoise.attach(fresh[0], "loss-free:rule=multiplicative", biases=biases)
    torch.save(biases, tmp_path / "biases.pt")
    again = equipoise.attach(model, "frozen", biases=torch.load(tmp_path / "biases.pt"))
    torch.testing.assert_close(again.biases, dict(biases))
    with pytest.raises(EquipoiseError, match=r"If torch\.save wrote it, load it and pass what torch\.load returns"):
        equipoise.attach(fresh[0], "frozen", biases=tmp_path / "biases.pt")
