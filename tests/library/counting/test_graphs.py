"""Compiled graphs: none is made twice."""

import models
import pytest
import torch
from block_net import BATCHES, STRATEGY, BlockNet, assert_same_outcome, block, block_net, exact_window, run_window, sums
from models import K

import equipoise
from equipoise import attach

FAMILIES = ("deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen3_moe")


@pytest.fixture
def no_recompilation():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: setattr(torch._dynamo.config, "error_on_recompile", True)
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def _num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_compiled_once(name, no_recompilation):
    """Three windows: masks and biases change, weights are trained, state and metrics are read."""
    model = models.family(name, layers=1)
    balance = attach(model, "loss-free:rate=0.1+lbl:coefficient=0.5")
    forward = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = None
    for window in range(3):
        for number in range(2):
            ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(2 * window + number))
            mask = torch.ones(2, 8, dtype=torch.long)
            mask[0, 8 - window - number :] = 0
            (forward(input_ids=ids, attention_mask=mask, labels=ids).loss + balance.loss()).backward()
            no_recompilation()
        optimizer.step()
        optimizer.zero_grad(set_to_none=window == 1)
        balance.step()
        assert [int(load.sum()) for load in balance.load.values()] == [2 * (32 - 2 * window - 1)]
        (bias,) = balance.biases.values()
        assert before is None or not torch.equal(bias, before)
        before = bias
        balance.load_state_dict(balance.state_dict())
        model.load_state_dict(model.state_dict())
        assert balance.metrics()["tokens"] == 32 - 2 * window - 1
    assert _num_graphs() == 1


def test_a_compiled_model_is_evaluated_and_measured_without_a_new_graph(no_recompilation):
    net = block_net()
    balance = attach(net, STRATEGY)
    forward = torch.compile(net, backend="aot_eager", fullgraph=True)
    graphs = None
    for _ in range(3):
        for batch in BATCHES[1:]:
            (forward(*batch) + balance.loss()).backward()
        with torch.no_grad():
            with balance.paused():
                forward(*BATCHES[1])
            with balance.measuring():
                forward(*BATCHES[2])
        net.eval()
        with torch.no_grad():
            with balance.measuring() as load:
                forward(*BATCHES[2])
            forward(*BATCHES[2])
        net.train()
        assert sums(load) == [K * 12] * 2
        balance.step()
        assert sums(balance.load) == [K * (8 + 12)] * 2
        no_recompilation()
        assert graphs in (None, _num_graphs())
        graphs = _num_graphs()
    assert graphs == 5, "with gradients, without, in evaluation; and two for the sequences of the first two"


def _ten_block_net(layers=10):
    torch.manual_seed(0)
    return BlockNet([block("softmax") for _ in range(layers)]).train()


def test_layers_that_are_compiled_one_by_one_share_a_graph(no_recompilation):
    """As they do without balancing. Dynamo gives up after eight graphs of one function."""
    net = _ten_block_net()
    expected = exact_window(net, BATCHES[:1])
    balance = attach(net, STRATEGY)
    for layer in net.blocks:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_same_outcome(run_window(net, balance, BATCHES[:1]), expected)
    assert _num_graphs() == 1
    no_recompilation()
    assert_same_outcome(run_window(net, balance, BATCHES[:1]), expected)


def test_two_attached_models_share_a_graph_and_are_counted_apart(no_recompilation):
    first, second = block_net(("softmax",)), block_net(("softmax",), seed=1)
    one, other = attach(first, STRATEGY), attach(second, STRATEGY)
    for net in (first, second):
        net.blocks[0].compile(backend="aot_eager", fullgraph=True)
    expected = [exact_window(block_net(("softmax",), seed=seed), BATCHES) for seed in (0, 1)]
    for order in ((0, 1), (1, 0)):
        for index in order:
            net, balance = ((first, one), (second, other))[index]
            assert_same_outcome(run_window(net, balance, BATCHES), expected[index])
    assert equipoise.metrics.max_violation(one.load) != equipoise.metrics.max_violation(other.load)
