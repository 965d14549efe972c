"""The value and gradient of a balancer's loss."""

from copy import deepcopy
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers import Balancer
from equipoise.load import sequence_load
from equipoise.routing import Routing, ScoreFunction, score
from equipoise.testing._common import NotApplicable, case, is_close, require, require_same
from equipoise.testing.balancers._windows import (
    EXPERTS,
    SEQUENCE_LENGTH,
    Factory,
    K,
    count_load,
    prepare_balancer,
    random_logits,
    route_layer,
    seeded,
    take_tokens,
)

TOKENS = 4 * SEQUENCE_LENGTH
OTHER_COUNTS = torch.tensor([31, 5, 0, 17, 9, 2])  # of the rest of the global batch


def load_of_scope(balancer: Balancer, routing: Routing, other_counts: Tensor) -> Int[Tensor, " experts"] | None:
    """The load that a balancer of this scope gets, if the rest of the global batch counted ``other_counts``."""
    if balancer.scope in ("sequence", "token"):
        return None
    return count_load(routing) + (other_counts if balancer.scope == "global_batch" else 0)


class LossCase(NamedTuple):
    inputs: dict[str, object]  # for the message of an error
    balancer: Balancer
    routing: Routing  # one layer's call
    load: Tensor | None  # of the balancer's scope


def _require_loss(factory: Factory) -> None:
    """Passes over a balancer without a loss."""
    if not factory().has_loss:
        raise NotApplicable


def _loss_cases(factory: Factory, score_function: ScoreFunction, dtype: torch.dtype = torch.float64) -> list[LossCase]:
    """One without a mask and one with a mask."""
    _require_loss(factory)
    cases = []
    for seed, masked in ((21, False), (22, True)):
        balancer = prepare_balancer(factory, score_function)
        logits = random_logits(seed, TOKENS)[0].to(dtype).requires_grad_()
        mask = (torch.rand(TOKENS, generator=seeded(seed)) < 0.7).float() if masked else None
        routing = route_layer(logits, K, score_function, mask=mask)
        inputs = dict(seed=seed, tokens=TOKENS, masked=masked, dtype=dtype)
        cases.append(LossCase(inputs, balancer, routing, load_of_scope(balancer, routing, OTHER_COUNTS)))
    return cases


def _loss_of(balancer: Balancer, routing: Routing, load: Tensor | None) -> Float[Tensor, ""]:
    value = balancer.loss(routing, load)
    require(isinstance(value, Tensor) and value.dim() == 0, f"{value!r}, not a scalar tensor")
    assert value is not None
    return value


def _gradient_of(value: Tensor, logits: Tensor) -> Float[Tensor, "tokens experts"]:
    require(value.requires_grad, "a loss without a gradient")
    (gradient,) = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
    require(gradient is not None, "a loss that does not depend on routing.logits")
    return gradient


def is_finite(factory: Factory, score_function: ScoreFunction) -> None:
    """The loss must be a finite scalar with a finite gradient for any logits, and both 0 without unmasked tokens."""
    _require_loss(factory)
    logits = random_logits(20, TOKENS)[0]
    calls = {
        "logits of 0": torch.zeros_like(logits),
        "logits of 1e4": 1e4 * logits,
        "logits of -95": logits - 95,  # sigmoid scores are denormal
        "logits of -1e4": logits - 1e4,
        "a logit of -1e4": torch.where(torch.arange(EXPERTS) == 0, -1e4, logits),
        "one token": logits[:1],
        "no tokens": logits[:0],
        "all tokens masked": logits,
    }
    for name, values in calls.items():
        balancer, values = prepare_balancer(factory, score_function), values.clone().requires_grad_()
        mask = torch.zeros(values.shape[0]) if name == "all tokens masked" else None
        routing = route_layer(values, K, score_function, mask=mask)
        for times in (0, 1, 2**40):
            other_counts = times * OTHER_COUNTS
            with case(call=name, logits=tuple(values.shape), counts_elsewhere=int(other_counts.sum())):
                value = _loss_of(balancer, routing, load_of_scope(balancer, routing, other_counts))
                gradient = _gradient_of(value, values)
                require(value.isfinite(), f"a loss of {value.item()}")
                require(gradient.isfinite().all(), "a gradient that is not finite")
                if name in ("no tokens", "all tokens masked"):
                    require(value == 0, f"a loss of {value.item()}")
                    require(not gradient.any(), "a gradient that is not 0")


def has_gradient_by_logits_only(factory: Factory, score_function: ScoreFunction) -> None:
    """The loss must have a gradient through routing.logits only, and none through weights and counts."""
    for inputs, balancer, routing, load in _loss_cases(factory, score_function):
        with case(**inputs):
            weights = routing.weights.clone().requires_grad_()
            value = _loss_of(balancer, routing._replace(weights=weights), load)
            require(_gradient_of(value, routing.logits).any(), "a gradient of 0 everywhere")
            (weight_gradient,) = torch.autograd.grad(value, weights, allow_unused=True)
            require(weight_gradient is None or not weight_gradient.any(), "a gradient through routing.weights")


def has_the_right_derivative(factory: Factory, score_function: ScoreFunction) -> None:
    """In float64 the gradient must equal central differences in random directions, with choice and load held fixed."""
    step = 1e-5
    for inputs, balancer, routing, load in _loss_cases(factory, score_function):
        gradient = _gradient_of(_loss_of(balancer, routing, load), routing.logits)
        for seed in range(8):
            direction = torch.randn(gradient.shape, generator=seeded(seed), dtype=torch.float64)
            with case(**inputs, seed_of_the_direction=seed):
                values = []
                for signed_step in (step, -step):
                    logits = routing.logits.detach() + signed_step * direction
                    moved = routing._replace(logits=logits, scores=score(logits, score_function))
                    values.append(_loss_of(balancer, moved, load))
                expected = (values[0] - values[1]).detach() / (2 * step)
                slope = (gradient * direction).sum()
                require(is_close(slope, expected, 1e-6, 1e-8), f"{slope.item()}, by differences {expected.item()}")


def ignores_masked_tokens(factory: Factory, score_function: ScoreFunction) -> None:
    """Masked tokens must get no gradient, and the loss must equal the loss of the other tokens alone, whatever the
    logits of masked tokens are."""
    for inputs, balancer, routing, load in _loss_cases(factory, score_function):
        if routing.mask is None:
            continue
        unmasked = routing.mask.nonzero()[:, 0]
        expected = _loss_of(balancer, take_tokens(routing, unmasked)._replace(mask=None), load)
        expected_gradient = _gradient_of(expected, routing.logits)
        for factor in (1.0, 1e3):
            with case(**inputs, logits_of_masked_tokens=f"times {factor:g}"):
                logits = torch.where(routing.mask[:, None] == 0, factor * routing.logits, routing.logits).detach()
                logits.requires_grad_()
                scaled = routing._replace(logits=logits, scores=score(logits, score_function))
                value = _loss_of(balancer, scaled, load)
                gradient = _gradient_of(value, logits)
                require(not gradient[routing.mask == 0].any(), "a gradient at masked tokens")
                require(
                    is_close(value, expected, 1e-12, 1e-14),
                    f"a loss of {value.item()}, without the masked tokens {expected.item()}",
                )
                require_same(gradient, expected_gradient, "a gradient of", rtol=1e-10, atol=1e-14)


def is_a_mean_over_tokens(factory: Factory, score_function: ScoreFunction) -> None:
    """The loss must be a mean over unmasked tokens: by the same load, the losses of the parts of a call, weighted by
    their tokens, give the loss of the whole. For scope sequence, parts consist of whole sequences."""
    for inputs, balancer, routing, load in _loss_cases(factory, score_function):
        whole = _loss_of(balancer, routing, load).detach()
        mask = torch.ones(TOKENS) if routing.mask is None else routing.mask
        part_sizes = (SEQUENCE_LENGTH, 3 * SEQUENCE_LENGTH, *(() if balancer.scope == "sequence" else (1, 7)))
        for size in part_sizes:
            with case(**inputs, tokens_of_a_part=size):
                total = torch.zeros((), dtype=torch.float64)
                for part in torch.arange(TOKENS).split(size):
                    total += mask[part].sum() * _loss_of(balancer, take_tokens(routing, part), load).detach()
                mean = total / mask.sum()
                require(is_close(mean, whole, 1e-10, 1e-12), f"{mean.item()} from the parts, {whole.item()} as a whole")


def is_independent_of_expert_order(factory: Factory, score_function: ScoreFunction) -> None:
    """Experts in another order must give the same loss."""
    order = torch.randperm(EXPERTS, generator=seeded(4))
    for inputs, balancer, routing, load in _loss_cases(factory, score_function):
        permuted = routing._replace(
            logits=routing.logits[:, order],
            scores=routing.scores[:, order],
            expert_ids=order.argsort()[routing.expert_ids],
        )
        with case(**inputs, order=order.tolist()):
            value = _loss_of(balancer, routing, load)
            permuted_value = _loss_of(balancer, permuted, None if load is None else load[order])
            require(
                is_close(permuted_value, value, 1e-10, 1e-12),
                f"{permuted_value.item()}, in the first order {value.item()}",
            )


def has_the_right_dtype(factory: Factory, score_function: ScoreFunction) -> None:
    """The loss must be float32 for logits of 16 bits and float32, and float64 for float64."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for inputs, balancer, routing, load in _loss_cases(factory, score_function, dtype):
            with case(**inputs):
                value, expected = _loss_of(balancer, routing, load), torch.promote_types(dtype, torch.float32)
                require(value.dtype == expected, f"{value.dtype}, not {expected}")
                require(_gradient_of(value, routing.logits).isfinite().all(), "a gradient that is not finite")


def leaves_the_coefficient_out(factory: Factory, score_function: ScoreFunction) -> None:
    """loss() must leave the coefficient out: the library multiplies by it."""
    for inputs, balancer, routing, load in _loss_cases(factory, score_function):
        larger = deepcopy(balancer)
        try:
            larger.coefficient = 3 * balancer.coefficient + 1
        except AttributeError:  # a property
            raise NotApplicable from None
        with case(**inputs, coefficient=larger.coefficient):
            value, expected = _loss_of(larger, routing, load), _loss_of(balancer, routing, load)
            require(
                value == expected, f"{value.item()}, with a coefficient of {balancer.coefficient} {expected.item()}"
            )


def has_slopes_that_agree(factory: Factory, score_function: ScoreFunction) -> None:
    """The slopes must give the loss: mean over the unmasked tokens of sum_e slope_e p_te, with the same gradient."""
    for inputs, balancer, routing, load in _loss_cases(factory, score_function):
        if not balancer.has_slopes:
            raise NotApplicable
        with case(**inputs):
            slopes = balancer.slopes(sequence_load(routing) if load is None else load)
            require(isinstance(slopes, Tensor), f"slopes {slopes!r}, not a tensor")
            assert slopes is not None
            of_token = slopes[routing.sequence_ids] if load is None else slopes.expand_as(routing.scores)
            p = routing.scores
            if balancer.normalise:
                p = p / p.sum(-1, keepdim=True)
            counts = torch.ones(TOKENS, dtype=torch.bool) if routing.mask is None else routing.mask != 0
            by_slopes = (p * of_token)[counts].sum() / counts.sum()
            value = _loss_of(balancer, routing, load)
            require(
                is_close(by_slopes, value, 1e-10, 1e-12), f"a loss of {value.item()}, by its slopes {by_slopes.item()}"
            )
            gradient, expected = (_gradient_of(one, routing.logits) for one in (by_slopes, value))
            require_same(gradient, expected, "a gradient of", rtol=1e-9, atol=1e-12)
