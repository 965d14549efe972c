"""Bias and state: their dtype, where they live, and that they are all there is to save."""

import torch

from equipoise.routing import ScoreFunction
from equipoise.testing._common import NotApplicable, require, require_same
from equipoise.testing.balancers._windows import (
    Factory,
    clone_state,
    get_bias,
    get_state,
    prepare_balancer,
    random_bias,
    require_same_state,
    require_update,
    train,
)


def bias_is_the_state(factory: Factory, score_function: ScoreFunction) -> None:
    """bias() must be one float32 tensor [layers, experts] without a gradient that starts at LayerStack.bias and is
    moved in place; so must the tensors of state(), which start at zero."""
    layer_bias = random_bias()
    start = layer_bias.clone()
    balancer = prepare_balancer(factory, score_function, layer_bias)
    state = get_state(balancer)
    bias = state["bias"]
    require_same(bias, start, "at the start, a bias of")
    for name, value in state.items():
        require(value.shape == start.shape, f"{name} of shape {tuple(value.shape)}, not {tuple(start.shape)}")
        require(not value.requires_grad, f"{name} requires a gradient")
        require(name == "bias" or not value.any(), f"the state {name} is not zero at the start")
    train(balancer, score_function, range(3))
    for name, value in get_state(balancer).items():
        require(value is state.get(name), f"another tensor for {name} after an update: it was not moved in place")
        require(value.dtype == start.dtype, f"{name} became {value.dtype}")
    require(torch.equal(layer_bias, start), "LayerStack.bias itself was moved: other balancers share it")
    bias.fill_(0.25)
    require((get_bias(balancer) == 0.25).all(), "bias() without what was written into it")


def stays_float64(factory: Factory, score_function: ScoreFunction) -> None:
    """With a float64 LayerStack.bias, bias and state must be and stay float64."""
    if not factory().has_bias:
        raise NotApplicable
    balancer = prepare_balancer(factory, score_function, random_bias().double())
    for moment in ("at the start", "after three windows"):
        for name, value in get_state(balancer).items():
            require(value.dtype == torch.float64, f"{name} is {value.dtype} {moment}")
        train(balancer, score_function, range(3))


def resumes(factory: Factory, score_function: ScoreFunction) -> None:
    """bias() and state() must hold all that update moves: with them written back, the balancer goes on as before."""
    require_update(factory)
    balancer = prepare_balancer(factory, score_function)
    train(balancer, score_function, range(3))
    saved = clone_state(balancer)
    train(balancer, score_function, range(3, 6))
    expected = clone_state(balancer)
    new_copy = prepare_balancer(factory, score_function)
    for subject, resumed in (("a new copy", new_copy), ("the same balancer set back", balancer)):
        state = get_state(resumed)
        require(state.keys() == saved.keys(), f"{subject} with the state {sorted(state)}, not {sorted(saved)}")
        for name, value in state.items():
            value.copy_(saved[name])
        train(resumed, score_function, range(3, 6))
        require_same_state(clone_state(resumed), expected, f"of {subject}, after windows 3 to 5")
