"""The statistics that reach ``update``, and the inputs of every hook."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from equipoise.balancers import Balancer
from equipoise.routing import ScoreFunction
from equipoise.testing._common import NotApplicable, case, require, require_same
from equipoise.testing.balancers._windows import (
    LAYERS,
    TOKENS,
    Factory,
    K,
    collect_window,
    count_load,
    prepare_balancer,
    random_logits,
    route_call,
    route_layer,
)
from equipoise.testing.balancers.loss import OTHER_COUNTS, load_of_scope


def has_a_fixed_form(factory: Factory, score_function: ScoreFunction) -> None:
    """A statistic must be int64, of a shape that depends on no data, in memory of its own; if it is gathered, it has
    one row per token and any dtype."""
    kind = type(factory())
    if (kind.statistic, kind.micro_batch_statistic) == (Balancer.statistic, Balancer.micro_batch_statistic):
        raise NotApplicable
    balancer = prepare_balancer(factory, score_function)
    call_shapes: set[Any] = set()
    micro_batch_shapes: set[Any] = set()
    for tokens, is_masked in ((TOKENS, False), (7, False), (7, True), (1, False), (0, False)):
        with case(tokens=tokens, all_masked=is_masked):
            mask = torch.zeros(tokens) if is_masked else None
            call = route_call(balancer, random_logits(1, tokens), score_function, mask=mask)
            for row, routing in enumerate(call):
                statistic = balancer.statistic(routing, row)
                if statistic is None:
                    call_shapes.add(None)
                    continue
                call_shapes.add(tuple(statistic.shape)[1 if balancer.gathers else 0 :])
                require(not balancer.gathers or statistic.shape[0] == tokens, f"shape {tuple(statistic.shape)}")
                require(
                    balancer.gathers or statistic.dtype == torch.int64,
                    f"a statistic of {statistic.dtype}, whose sums may round",
                )
                require(not statistic.requires_grad, "a statistic that requires a gradient")
                before = statistic.clone()
                balancer.statistic(route_layer(-routing.logits, K, score_function), row)
                require(torch.equal(statistic, before), "a statistic that changed with the next call: the same memory")
                statistic.add_(1)
                again = balancer.statistic(routing, row)
                is_same = again is not None and torch.equal(again, before)
                require(is_same, "another statistic of the same call after the first was written into: the same memory")
            load = torch.stack([count_load(routing) for routing in call])
            by_layer = balancer.micro_batch_statistic(load)
            micro_batch_shapes.add(None if by_layer is None else tuple(by_layer.shape)[1:])
            if by_layer is not None:
                require(
                    by_layer.dtype == torch.int64,
                    f"a statistic of a micro-batch of {by_layer.dtype}, whose sums may round",
                )
                require(by_layer.shape[0] == LAYERS, f"shape {tuple(by_layer.shape)} for {LAYERS} layers")
    for hook, shapes in (("statistic", call_shapes), ("micro_batch_statistic", micro_batch_shapes)):
        require(len(shapes) == 1, f"{hook} of the shapes {shapes} for calls with more, few, masked and no tokens")
    both = (call_shapes | micro_batch_shapes) - {None}
    if not both:
        raise NotApplicable
    require(len(both) == 1, f"shapes {both} from statistic and micro_batch_statistic, which are added up")


def leaves_inputs_unchanged(factory: Factory, score_function: ScoreFunction) -> None:
    """No hook may change its inputs: routing, load, statistics."""
    balancer = prepare_balancer(factory, score_function)
    mask = torch.ones(TOKENS)
    mask[:5] = 0
    call = route_call(balancer, random_logits(1), score_function, mask=mask)
    load, statistic = collect_window(balancer, [[call]])
    inputs = (call, load, statistic)
    hooks: dict[str, Callable[[], object]] = {
        "statistic": lambda: balancer.statistic(call[0], 0),
        "micro_batch_statistic": lambda: balancer.micro_batch_statistic(load),
        "loss": lambda: balancer.loss(call[0], load_of_scope(balancer, call[0], OTHER_COUNTS)),
        "update": lambda: balancer.update(load, statistic, 0),
    }
    for name, run_hook in hooks.items():
        inputs_before = deepcopy(inputs)
        with case(hook=name, tokens=TOKENS):
            run_hook()
            for after, before in zip(tree_leaves(inputs), tree_leaves(inputs_before), strict=True):
                if isinstance(after, Tensor):
                    require_same(after, before, "an input that became")
