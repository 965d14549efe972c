"""Whatever a Balance gives may be written into: nothing inside it changes."""

import copy

import pytest
import torch
from block_net import BATCHES, STRATEGY, block_net, sums
from models import K
from torch import Tensor

from equipoise import attach

STATEFUL = "loss-free:rule=momentum,rate=0.1+lbl:pooling=previous,coefficient=0.1"


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inside in value.values():
            yield from _tensors(inside)


def _plain(value):
    if isinstance(value, Tensor):
        return value.tolist()
    return {key: _plain(inside) for key, inside in value.items()} if isinstance(value, dict) else value


def _window(net, balance, batches=BATCHES):
    gradients = []
    for batch in batches:
        net.zero_grad()
        (net(*batch) + balance.loss()).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    balance.step()
    return gradients


RESULTS = {
    "load": lambda balance: balance.load,
    "peek_load": lambda balance: balance.peek_load(),
    "biases": lambda balance: balance.biases,
    "num_tokens": lambda balance: balance.num_tokens,
    "state_dict": lambda balance: balance.state_dict(),
    "loss": lambda balance: balance.loss().detach(),
}


@pytest.mark.parametrize("strategy", [STRATEGY, STATEFUL, "none"])
@pytest.mark.parametrize("what", RESULTS)
def test_writing_into_a_result_changes_nothing(what, strategy):
    (net, balance), (other, expected) = ((net, attach(net, strategy)) for net in (block_net(), block_net()))
    for _ in range(2):
        assert [[*map(torch.Tensor.tolist, step)] for step in _window(net, balance)] == [
            [*map(torch.Tensor.tolist, step)] for step in _window(other, expected)
        ]
        for written in _tensors(RESULTS[what](balance)):
            written.fill_(7)
        for result in ("load", "peek_load", "biases", "num_tokens", "state_dict"):
            assert _plain(RESULTS[result](balance)) == _plain(RESULTS[result](expected))
        assert balance.metrics() == expected.metrics()


def test_two_readings_of_a_load_are_apart_and_a_kept_one_stays():
    net = block_net()
    balance = attach(net, STRATEGY)
    _window(net, balance)
    kept, peeked, first = balance.load, balance.peek_load(), copy.deepcopy(balance.load)
    for load in (kept, peeked):
        load["blocks.0.gate"].zero_()
        assert torch.equal(load["blocks.1.gate"], first["blocks.1.gate"])
    assert sums(balance.load) == [K * 34] * 2
    kept = balance.load
    _window(net, balance, BATCHES[1:])
    assert sums(kept) == [K * 34] * 2 and sums(balance.load) == [K * 20] * 2


def test_a_load_before_the_first_window_is_apart():
    balance = attach(block_net(), STRATEGY)
    for load in balance.load.values():
        load.fill_(7)
    assert not any(load.any() for load in balance.load.values())


def test_a_measured_load_is_apart():
    net = block_net()
    balance = attach(net, STRATEGY)
    loads = []
    for _ in range(2):
        with balance.measuring() as load:
            net(*BATCHES[1])
        loads.append(_plain(load))
        for counts in load.values():
            counts.fill_(7)
    assert loads[0] == loads[1] and not any(load.any() for load in balance.load.values())


def test_what_detach_returns_is_apart_from_the_slot():
    net = block_net()
    balance = attach(net, STRATEGY)
    _window(net, balance)
    slot = net.blocks[0].gate.e_score_correction_bias
    before = slot.clone()
    for bias in balance.detach().values():
        bias.fill_(7)
    assert torch.equal(slot, before) and before.any()


def test_biases_and_states_that_were_given_may_be_written_into():
    net = block_net()
    balance = attach(net, STRATEGY)
    _window(net, balance)
    state, given = balance.state_dict(), balance.detach()
    expected = _plain(state)
    again = attach(net, STRATEGY, biases=given)
    again.load_state_dict(state)
    for tensor in (*_tensors(state), *given.values()):
        tensor.fill_(7)
    assert _plain(again.state_dict()) == expected
