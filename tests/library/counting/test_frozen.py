"""Frozen parameters: no gradient, and everything is counted."""

import pytest
import torch
from block_net import (
    ALL_MASKED,
    BATCHES,
    ORDERS,
    STRATEGY,
    TOKENS,
    assert_same_outcome,
    block_net,
    exact_window,
    routers_of,
    run_window,
    save_tap,
    sums,
)
from models import K
from windows import assert_gradients_close

from equipoise import attach

IS_FROZEN = {
    "routers": lambda name: ".gate." in name,
    "the first router": lambda name: name.startswith("blocks.0.gate"),
    "all but experts": lambda name: not name.endswith(".experts"),
    "all but routers": lambda name: ".gate." not in name,
    "all but the last layer's output": lambda name: not name.startswith("blocks.1.out"),  # no path to any router
    "the embedding and the routers": lambda name: ".gate." in name or name.startswith("embed"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [None, "non_reentrant", save_tap])
@pytest.mark.parametrize("frozen", IS_FROZEN)
def test_frozen_parts_have_no_gradient_and_everything_is_counted(frozen, kind, order):
    net = block_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not IS_FROZEN[frozen](name))
    expected = exact_window(net, BATCHES, order)
    balance = attach(net, STRATEGY)
    net.checkpointing = [kind] * 3
    assert_same_outcome(run_window(net, balance, BATCHES, order), expected)
    assert sums(expected.loads) == [K * TOKENS] * 2
    assert all(bias.any() for bias in expected.biases.values())
    assert {name for name, p in net.named_parameters() if p.grad is None} == {
        name for name, _ in net.named_parameters() if IS_FROZEN[frozen](name)
    }


@pytest.mark.parametrize("frozen", ["routers", "all but the last layer's output"])
def test_frozen_parts_in_a_compiled_graph(frozen):
    torch._dynamo.reset()
    net = block_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not IS_FROZEN[frozen](name))
    expected = exact_window(net, BATCHES)
    balance = attach(net, STRATEGY)
    assert_same_outcome(
        run_window(net, balance, ALL_MASKED, forward=torch.compile(net, backend="aot_eager", fullgraph=True)), expected
    )


def test_routers_may_be_frozen_between_micro_batches():
    """For example, at the end of a warm-up. The micro-batch before has a gradient, the one after has none."""
    net = block_net()
    alone = exact_window(net, BATCHES[:1])
    balance = attach(net, STRATEGY)
    (net(*BATCHES[0]) + balance.loss()).backward()
    for router, _ in routers_of(net).values():
        router.requires_grad_(False)
    gradients = {name: router.weight.grad.clone() for name, (router, _) in routers_of(net).items()}
    assert_gradients_close(
        {f"{n}.weight": g for n, g in gradients.items()},
        {f"{n}.weight": alone.gradients[f"{n}.weight"] for n in gradients},
    )
    (net(*BATCHES[1]) + balance.loss()).backward()
    for name, (router, _) in routers_of(net).items():
        assert torch.equal(router.weight.grad, gradients[name])
    balance.step()
    assert sums(balance.load) == [K * (14 + 8)] * 2
