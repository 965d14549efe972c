"""``state_dict()`` and ``load_state_dict()``."""

import pytest
import torch
from models import EXPERTS
from windows import LAYERS, assert_gradients_close, attach_tiny, clone_gradients, random_ids

from equipoise import EquipoiseError

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


def test_state_dicts_are_refused_inside_a_window():
    for strategy in ("loss-free", "lbl"):
        model, balance = attach_tiny(strategy)
        state = balance.state_dict()
        model(random_ids())
        for call in (balance.state_dict, lambda: balance.load_state_dict(state)):  # noqa: B023
            with pytest.raises(EquipoiseError, match="between windows"):
                call()
        balance.loss()
        with pytest.raises(EquipoiseError, match="between windows"):
            balance.state_dict()
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
