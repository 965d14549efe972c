"""Other weights in a slot for a while, as an average for an evaluation: the bias that comes back brings its state."""

from contextlib import contextmanager

import pytest
import torch
from block_net import BATCHES, block_net
from models import EXPERTS
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from equipoise import Balancer, attach

MOMENTUM = "loss-free:rule=momentum,rate=0.3,momentum=0.75"
SLOT = "e_score_correction_bias"


def _step(net, balance):
    for batch in BATCHES[:2]:
        net(*batch)
        balance.loss()
    balance.step()


def _momenta(balance):
    return list(balance.state_dict()["state"]["momentum"].values())


def _load(net, tensors):
    net.load_state_dict(tensors, strict=False)


@torch.no_grad()
def _copy(net, tensors):
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        tensor.copy_(tensors[name])


@torch.no_grad()
def _copy_data(net, tensors):
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        tensor.data.copy_(tensors[name])


WAYS = {"load_state_dict": _load, "copy_": _copy, "data.copy_": _copy_data}


def _tensors(net, dtype=None):
    both = (*net.named_parameters(), *net.named_buffers())
    rounded = {name: t.detach().clone() for name, t in both}
    if dtype is not None:
        rounded |= {name: t.to(dtype).to(t.dtype) for name, t in rounded.items() if "bias" in name}
    return rounded


def _average(net, balance):
    """Of the weights and buffers after each of two steps."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(2):
        _step(net, balance)
        average.update_parameters(net)
    return _tensors(average.module)


def _trained(kinds):
    net = block_net(kinds)
    balance = attach(net, MOMENTUM)
    average = _average(net, balance)
    assert all(momentum.any() for momentum in _momenta(balance))
    return net, balance, average


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kinds", [("sigmoid", "sigmoid"), ("sigmoid", "softmax")])
def test_a_run_goes_on_as_if_the_average_had_never_been_there(kinds, way, dtype):
    net, balance, average = _trained(kinds)
    straight, straight_balance, _ = _trained(kinds)
    own, biases, momenta = _tensors(net, dtype), balance.biases, _momenta(balance)
    for tensors in (average, {name: tensor * 0.5 for name, tensor in average.items()}):  # two averages in a row
        WAYS[way](net, tensors)
        with_slot = {
            f"blocks.{i}.gate" for i, kind in enumerate(kinds) if kind == "sigmoid" or way != "load_state_dict"
        }
        for name in biases:
            slot = f"{name}.{SLOT if f'{name}.{SLOT}' in tensors else '_equipoise_bias'}"
            expected = tensors[slot] if name in with_slot else biases[name]
            assert torch.equal(balance.biases[name], expected)
        with balance.measuring():
            net(*BATCHES[2])
    WAYS[way](net, own)
    assert all(torch.equal(balance.biases[name], biases[name]) for name in biases)
    assert all(map(torch.equal, _momenta(balance), momenta))
    _step(net, balance)
    _step(straight, straight_balance)
    for name, bias in straight_balance.biases.items():
        assert torch.equal(balance.biases[name], bias)
    assert all(map(torch.equal, _momenta(balance), _momenta(straight_balance)))


@pytest.mark.parametrize("way", WAYS)
def test_a_foreign_bias_begins_with_a_momentum_of_zero(way):
    net, balance, _ = _trained(("sigmoid", "sigmoid"))
    tensors = _tensors(net)
    foreign = torch.linspace(-1, 1, EXPERTS)
    WAYS[way](net, {**tensors, f"blocks.1.gate.{SLOT}": foreign})
    first, second = balance.biases.values()
    assert torch.equal(second, foreign) and torch.equal(first, tensors[f"blocks.0.gate.{SLOT}"])
    first, second = _momenta(balance)
    assert first.any() and not second.any()
    _step(net, balance)
    load = balance.load["blocks.1.gate"].double()
    step = 0.25 * 0.3 * torch.tanh(2 * (load.mean() - load) / load.mean())
    expected = foreign.double() + step - step.mean()
    assert_close(balance.biases["blocks.1.gate"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("was_swapped", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_bias_that_a_step_has_moved_away_from_does_not_bring_the_later_momentum(way, was_swapped):
    """An earlier bias of the same run is not the one that the momentum belongs to."""
    net, balance, average = _trained(("sigmoid", "sigmoid"))
    earlier = _tensors(net)
    for tensors in (average, earlier) if was_swapped else ():
        WAYS[way](net, tensors)
        assert torch.equal(balance.biases["blocks.0.gate"], tensors[f"blocks.0.gate.{SLOT}"])
    _step(net, balance)
    WAYS[way](net, earlier)
    assert torch.equal(balance.biases["blocks.0.gate"], earlier[f"blocks.0.gate.{SLOT}"])
    assert not any(momentum.any() for momentum in _momenta(balance))


@pytest.mark.parametrize("way", WAYS)
def test_one_expert_of_its_own_value_is_enough_for_a_bias_to_be_another(way):
    """Numbers that both biases share say nothing: the whole bias comes back, or none of it."""
    net, balance, _ = _trained(("sigmoid", "sigmoid"))
    own, momenta = _tensors(net), _momenta(balance)
    slot = f"blocks.0.gate.{SLOT}"
    other = own[slot].clone()
    other[1] += 0.5
    WAYS[way](net, {**own, slot: other})
    assert torch.equal(balance.biases["blocks.0.gate"], other) and not _momenta(balance)[0].any()
    third = other.clone()
    third[2] -= 0.5
    WAYS[way](net, {**own, slot: third})
    assert torch.equal(balance.biases["blocks.0.gate"], third) and not _momenta(balance)[0].any()
    WAYS[way](net, own)
    assert torch.equal(balance.biases["blocks.0.gate"], own[slot])
    assert all(map(torch.equal, _momenta(balance), momenta))


def test_a_loaded_state_comes_back_too():
    net, balance, average = _trained(("sigmoid", "sigmoid"))
    own, state = _tensors(net), balance.state_dict()
    again = block_net(("sigmoid", "sigmoid"), seed=1)
    balance = attach(again, MOMENTUM)
    again.load_state_dict(own)
    balance.load_state_dict(state)
    again.load_state_dict(average)
    again.load_state_dict(own)
    assert all(map(torch.equal, _momenta(balance), state["state"]["momentum"].values()))


class TwoStates(Balancer):
    """Keeps the last load and the number of windows: every value of a state comes back, not only a momentum."""

    def prepare(self, layers):
        self._bias = layers.bias.clone()
        self._last, self._age = torch.zeros_like(self._bias), torch.zeros_like(self._bias)

    def bias(self):
        return self._bias

    def state(self):
        return {"last": self._last, "age": self._age}

    def update(self, load, statistic=None, window=0):
        self._last.copy_(load)
        self._age += 1
        self._bias += 0.125 * self._age


@pytest.mark.parametrize("way", WAYS)
def test_every_value_of_the_state_comes_back(way):
    net = block_net(("sigmoid", "sigmoid"))
    balance = attach(net, TwoStates())
    average = _average(net, balance)
    own, state = _tensors(net), balance.state_dict()["state"]
    WAYS[way](net, average)
    assert not any(value.any() for part in balance.state_dict()["state"].values() for value in part.values())
    WAYS[way](net, own)
    now = balance.state_dict()["state"]
    assert now.keys() == {"last", "age"}
    assert all(torch.equal(now[key][name], state[key][name]) for key in now for name in state[key])


@contextmanager
def _moved_away(net):
    """To another device and back, as for a rollout."""
    tensors = _tensors(net)
    net.to("meta")
    yield
    net.to_empty(device="cpu")
    net.load_state_dict(tensors, strict=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_was_cast_and_moved_gets_its_momentum_back(way):
    net, balance, average = _trained(("sigmoid", "sigmoid"))
    own, momenta = _tensors(net), _momenta(balance)
    WAYS[way](net, average)
    balance.biases  # noqa: B018  # adopts
    with _moved_away(net.to(torch.bfloat16)):
        pass
    net.to(torch.float32)
    WAYS[way](net, own)
    balance.biases  # noqa: B018
    assert all(map(torch.equal, _momenta(balance), momenta))


def test_an_added_slot_that_was_written_is_the_bias_that_is_saved_and_moved():
    """The biases of an average that stays, buffers included."""
    net, balance, average = _trained(("softmax", "softmax"))
    _copy(net, average)
    expected = {name: average[f"{name}._equipoise_bias"] for name in balance.biases}
    for biases in (balance.biases, balance.state_dict()["biases"]):
        assert all(torch.equal(biases[name], expected[name]) for name in expected)
    _step(net, balance)
    for name, load in balance.load.items():
        step = 0.25 * 0.3 * torch.tanh(2 * (load.double().mean() - load) / load.double().mean())
        assert_close(balance.biases[name].double(), expected[name] + step - step.mean(), rtol=0, atol=1e-6)
