"""Which experts a router chooses, and that nothing else changes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from equipoise.attachment import attach
from equipoise.balancers import Balancer, Frozen, LoadBalancingLoss, LossFree
from equipoise.routers.find import find_routers
from equipoise.testing._common import NotApplicable, case, fail, require
from equipoise.testing.routers._compare import (
    expert_groups_of,
    require_best_experts,
    require_plain_weights,
    require_same_bits,
    require_same_gradients,
)
from equipoise.testing.routers._subject import (
    Subject,
    drain,
    gradients_of,
    run_model,
    scalar_of,
    seeded,
    tensors_of,
)


def is_unchanged_at_bias_zero(subject: Subject) -> None:
    """Attached with the biases that the model came with, without losses, outputs and every gradient must be the same
    bit for bit."""
    expected: tuple[list[Tensor], dict[str, Tensor]] | None = None
    strategies: dict[str, list[Balancer] | None] = {
        "nothing": None,
        "nothing, again": None,
        "attach()": [],
        "frozen": [Frozen()],
        "loss-free": [LossFree()],
        "loss-free and a loss of coefficient 0": [LossFree(), LoadBalancingLoss(0.0)],
    }
    for name, balancers in strategies.items():
        with case(attached=name):
            model = subject.copy()
            balance = None if balancers is None else attach(model, *balancers, where=subject.where)
            calls = subject.record(model)
            output, loss = run_model(model, subject.batch)
            decisions = [
                value
                for layer_calls in calls.values()
                for call in layer_calls
                for value in (call.logits, call.weights, call.expert_ids)
            ]
            (loss if balance is None else loss + balance.loss()).backward()
            result = ([*tensors_of(output), *decisions], gradients_of(model))
            expected = result if expected is None else expected
            if name == "nothing, again" and not all(map(torch.equal, result[0], expected[0])):
                fail("the model itself is not reproducible: another output without equipoise; make it deterministic")
            require_same_bits(result[0], expected[0], "output")
            require_same_gradients(result[1], expected[1])


def follows_a_bias(subject: Subject) -> None:
    """A bias must move the choice to the top-k of score + bias, also for the experts that compute, and must leave
    logits and weights as they are."""
    for size, biases in (("moderate", subject.random_biases(1.0)), ("large", subject.decisive_biases())):
        for training in (True, False):
            with case(bias=size, training=training):
                _require_steered(subject, biases, training, Frozen())


def follows_a_factor(subject: Subject) -> None:
    """A factor must move the choice to the top-k of score * (1 + bias), also for the experts that compute, and must
    leave logits and weights as they are."""
    for layer in find_routers(subject.model):
        if subject.where is not None and not subject.where(layer.name, layer.router):
            continue
        slot_bias = None if layer.slot is None else layer.slot.tensor
        has_groups = expert_groups_of(layer.router).get("num_groups", 1) > 1
        if has_groups or layer.kind.selection == "logits" or (slot_bias is not None and slot_bias.any()):
            raise NotApplicable  # attach refuses a factor there
    biases = {name: bias.clamp(-0.9, 9) for name, bias in subject.random_biases(1.0).items()}
    biases = {name: bias / bias.abs().max() / 2 for name, bias in biases.items()}
    for size, factor_biases in (("moderate", biases), ("large", subject.decisive_biases())):
        with case(factor=size):
            _require_steered(subject, factor_biases, True, LossFree(rule="multiplicative"))


def _require_steered(subject: Subject, biases: Mapping[str, Tensor], training: bool, balancer: Balancer) -> None:
    plain = subject.copy().train(training)
    plain_calls = subject.record(plain)
    model, balance = subject.attached(balancer, biases=biases)
    model.train(training)
    with torch.no_grad():
        plain_output, _ = run_model(plain, subject.batch)
        calls = subject.record(model)
        output, _ = run_model(model, subject.batch)
        plain_routers = subject.routers(plain)
        any_moved = False
        for name, (router, kind) in subject.routers(model).items():
            with case(layer=name):
                require(calls[name], "no call of the router")
                require_same_bits([balance.biases[name].cpu()], [biases[name]], "Balance.biases")
                call = calls[name][-1]
                plain_calls[name].clear()
                with seeded():
                    plain_routers[name][0](*call.args, **call.kwargs)
                plain_call = plain_calls[name][-1]
                require_best_experts(call, router, kind, biases[name], balancer.multiplies)
                require_plain_weights(call, plain_call, kind)
                ids, plain_ids = (c.expert_ids.sort(-1).values for c in (call, plain_call))
                any_moved = any_moved or not torch.equal(ids, plain_ids)
        if any_moved:
            is_same = torch.equal(scalar_of(output), scalar_of(plain_output))
            require(not is_same, "the output of the model without equipoise: the experts do not follow the choice")


def follows_a_step(subject: Subject) -> None:
    """After step() the routers must choose by the bias that it moved; step(applied=False) must move nothing."""
    model, balance = subject.attached(LossFree(0.1, rule="sign"))
    recorded = subject.record(model)
    with torch.no_grad(), balance.counting():
        for applied in (True, False):
            biases_before = balance.biases
            run_model(model, subject.batch)
            balance.step(applied)
            for name, bias in balance.biases.items():
                with case(layer=name, applied=applied):
                    load, before = balance.load[name], biases_before[name]
                    has_moved = not torch.equal(bias, before)
                    is_even = load.min() == load.max()
                    require(
                        has_moved == (applied and not is_even),
                        f"a bias of {bias.tolist()} after one of {before.tolist()}",
                    )
            drain(recorded)
            with balance.paused():
                run_model(model, subject.batch)
            calls = drain(recorded)
            for name, (router, kind) in subject.routers(model).items():
                with case(layer=name, applied=applied):
                    require_best_experts(calls[name][-1], router, kind, balance.biases[name], False)
