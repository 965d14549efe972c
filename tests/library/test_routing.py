import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from equipoise.routing import SCORE_FUNCTIONS, Routing, route, score

score_functions = pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
LN3 = 1.0986122886681098


def _logits(tokens=40, experts=12, seed=0, dtype=torch.float64):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- score ----


def test_score_by_hand():
    # softmax (0, ln 3): 1/4, 3/4; sigmoid(ln 3) = 3/4; sqrt(ln(1 + e^0)) = sqrt(ln 2)
    logits = torch.tensor([[0.0, LN3]], dtype=torch.float64)
    assert_close(score(logits, "softmax"), torch.tensor([[0.25, 0.75]], dtype=torch.float64))
    assert_close(score(logits, "sigmoid"), torch.tensor([[0.5, 0.75]], dtype=torch.float64))
    expected = torch.tensor([[0.6931471805599453**0.5, 1.3862943611198906**0.5]], dtype=torch.float64)
    assert_close(score(logits, "sqrt_softplus"), expected)


@score_functions
def test_score_equals_the_reference(score_function):
    logits = _logits() * 5
    expected = torch.tensor(reference.scores(logits.tolist(), score_function), dtype=torch.float64)
    assert_close(score(logits, score_function), expected, rtol=1e-12, atol=1e-14)  # float64, a dozen terms


@score_functions
@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32)]
    + [(torch.float64, torch.float64)],
)
def test_score_is_float32_or_wider(score_function, given_dtype, expected):
    logits = _logits(dtype=given_dtype)
    scores = score(logits, score_function)
    assert scores.dtype == expected
    # widened before the score function, not after: equal bit for bit to the scores of the widened logits
    assert torch.equal(scores, score(logits.to(expected), score_function))


@score_functions
def test_score_has_a_finite_gradient_at_extreme_logits(score_function):
    logits = torch.tensor([[0.0, 60.0, -60.0, -120.0, 120.0]], requires_grad=True)
    scores = score(logits, score_function)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert logits.grad.isfinite().all(), logits.grad


def test_score_refuses_an_unknown_score_function():
    with pytest.raises(ValueError, match="score_function must be one of softmax, sigmoid, sqrt_softplus: got 'tanh'"):
        score(torch.zeros(1, 2), "tanh")


# ---- route ----

CASES = {
    "plain": {},
    "bias": {"bias": True},
    "renormalise": {"renormalise": True},
    "scale": {"scale": 2.5, "renormalise": True, "bias": True},
    "groups": {"num_groups": 4, "top_groups": 2},
    "groups_bias": {"num_groups": 4, "top_groups": 2, "bias": True, "renormalise": True, "scale": 2.5},
    "groups_of_one": {"num_groups": 12, "top_groups": 5},
    "all_groups": {"num_groups": 3, "top_groups": 3},
}


@score_functions
@pytest.mark.parametrize("case", CASES)
def test_route_equals_the_reference(score_function, case):
    options = dict(CASES[case])
    logits = _logits()
    bias = None
    if options.pop("bias", False):
        bias = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3
    routing = route(logits, 3, score_function=score_function, bias=bias, **options)
    ids, weights = reference.route(
        logits.tolist(), 3, score_function, None if bias is None else bias.tolist(), **options
    )
    assert routing.expert_ids.tolist() == ids
    assert_close(routing.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert routing.logits is logits
    assert torch.equal(routing.scores, score(logits, score_function))


def test_weights_of_scores_that_underflow_are_zero_not_nan():
    logits = torch.full((2, 4), -1e4, requires_grad=True)
    weights = route(logits, 2, score_function="sigmoid", renormalise=True).weights
    weights.sum().backward()
    assert not weights.any() and logits.grad.isfinite().all()


def test_route_by_hand():
    # sigmoid scores .5 .75 .5: experts 1, then (with a bias of +.1) 2; weights .75, .5, together 1.25
    logits = torch.tensor([[0.0, LN3, 0.0]], dtype=torch.float64)
    routing = route(
        logits,
        2,
        score_function="sigmoid",
        bias=torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64),
        renormalise=True,
        scale=5.0,
    )
    assert routing.expert_ids.tolist() == [[1, 2]]
    assert_close(routing.weights, torch.tensor([[3.0, 2.0]], dtype=torch.float64))


@score_functions
def test_biases_change_the_choice_and_never_the_weights(score_function):
    logits = _logits(200)
    bias = torch.zeros(12, dtype=torch.float64)
    bias[5], bias[7] = 0.4, -0.4  # experts that are chosen, with a bias that is not zero
    plain, steered = (
        route(logits, 3, score_function=score_function),
        route(logits, 3, score_function=score_function, bias=bias),
    )
    assert (steered.expert_ids == 5).sum() > (plain.expert_ids == 5).sum() + 20
    assert (steered.expert_ids == 7).sum() < (plain.expert_ids == 7).sum() - 5
    chosen = steered.expert_ids == 5
    assert torch.equal(steered.weights, score(logits, score_function).gather(1, steered.expert_ids))
    assert torch.equal(steered.weights[chosen], steered.scores[:, 5][chosen.any(1)])


def test_weights_carry_the_gradient_and_the_bias_gets_none():
    logits = _logits(8, 4).requires_grad_()
    bias = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    route(logits, 2, score_function="sigmoid", bias=bias).weights.sum().backward()
    assert bias.grad is None
    assert ((logits.grad != 0).sum(1) == 2).all()


@score_functions
def test_a_common_shift_of_the_bias_changes_nothing(score_function):
    logits, bias = _logits(), torch.arange(12, dtype=torch.float64) / 40
    shifted = route(logits, 3, score_function=score_function, bias=bias - 0.5)
    assert torch.equal(shifted.expert_ids, route(logits, 3, score_function=score_function, bias=bias).expert_ids)


def test_a_masked_group_never_wins_when_biased_scores_are_negative():
    # group 0: experts 0 1, group 1: experts 2 3; all biased scores are below 0, group 1 is the better one
    bias = torch.tensor([-1.0, -3.0, -1.2, -1.2])
    routing = route(torch.zeros(1, 4), 2, score_function="sigmoid", bias=bias, num_groups=2, top_groups=1)
    # values: (.5 - 1) + (.5 - 3) = -3 against 2 (.5 - 1.2) = -1.4
    assert sorted(routing.expert_ids[0].tolist()) == [2, 3]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 3)]), st.floats(-3, 3))
def test_chosen_experts_lie_in_the_best_groups(seed, groups, shift):
    num_groups, top_groups = groups
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 16, generator=generator)
    bias = torch.randn(16, generator=generator) + shift
    k = 16 // num_groups * top_groups  # all experts of the groups that are open
    routing = route(logits, k, score_function="sigmoid", bias=bias, num_groups=num_groups, top_groups=top_groups)
    size = 16 // num_groups
    for ids in routing.expert_ids.tolist():
        assert len(set(ids)) == k
        assert len({e // size for e in ids}) == top_groups


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SCORE_FUNCTIONS), st.integers(1, 6))
def test_permuting_experts_permutes_the_result(seed, score_function, k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    plain = route(logits, k, score_function=score_function, bias=bias)
    permuted = route(logits[:, order], k, score_function=score_function, bias=bias[order])
    assert torch.equal(order[permuted.expert_ids], plain.expert_ids)
    assert_close(permuted.weights, plain.weights, rtol=1e-12, atol=0)  # a softmax sums in another order


@score_functions
def test_all_experts_may_be_chosen(score_function):
    routing = route(_logits(7, 5), 5, score_function=score_function, renormalise=True)
    assert torch.equal(routing.expert_ids.sort(-1).values, torch.arange(5).expand(7, 5))
    assert_close(routing.weights.sum(-1), torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=0)


def test_no_tokens_give_an_empty_routing():
    routing = route(torch.zeros(0, 4), 2)
    assert routing.expert_ids.shape == routing.weights.shape == (0, 2)


def test_bfloat16_logits_are_chosen_by_float32_scores():
    # 3 and 3 + 1/64 are different bfloat16 numbers whose sigmoids round to the same bfloat16
    logits = torch.tensor([[3.0, 3.015625]], dtype=torch.bfloat16)
    assert logits[0, 0] != logits[0, 1] and logits.sigmoid()[0, 0] == logits.sigmoid()[0, 1]
    routing = route(logits, 1, score_function="sigmoid")
    assert routing.weights.dtype == torch.float32 and routing.expert_ids.tolist() == [[1]]


def test_route_carries_the_mask():
    mask = torch.tensor([1.0, 0.0])
    assert route(torch.zeros(2, 3), 1, mask=mask).mask is mask
    assert isinstance(route(torch.zeros(2, 3), 1), Routing) and route(torch.zeros(2, 3), 1).mask is None


@pytest.mark.parametrize(
    ("shape", "k", "options", "message"),
    [
        ((2, 3, 4), 1, {}, r"logits must have the shape \(tokens, experts\): got \(2, 3, 4\)"),
        ((2, 4), 0, {}, "k must lie between 1 and the 4 experts that may be chosen: got k=0"),
        ((2, 4), 5, {}, "k must lie between 1 and the 4 experts"),
        ((2, 4), 3, {"num_groups": 2}, "k must lie between 1 and the 2 experts"),
        ((2, 4), 1, {"num_groups": 3}, "must divide into groups.*4 experts, num_groups=3"),
        ((2, 4), 1, {"num_groups": 2, "top_groups": 3}, "top_groups=3"),
        ((2, 4), 1, {"num_groups": 0}, "num_groups=0"),
        ((2, 4), 1, {"bias": torch.zeros(3)}, r"expected shape \(4,\), got \(3,\)"),
        ((2, 4), 1, {"bias": torch.zeros(1, 4)}, r"expected shape \(4,\), got \(1, 4\)"),
        ((2, 4), 1, {"mask": torch.ones(3)}, r"mask must hold one number per token: expected shape \(2,\)"),
        ((2, 4), 1, {"bias": 1.0}, "bias must hold one number per expert.*got float"),
        ((2, 4), 1, {"score_function": "relu"}, "score_function must be one of"),
        ((2, 4), 2.0, {}, "k must be an integer: got 2.0"),
        ((2, 4), 1, {"num_groups": 2.0}, "num_groups must be an integer: got 2.0"),
        ((2, 4), 1, {"scale": 0.0}, "scale must be a finite positive number: got 0.0"),
        ((2, 4), 1, {"scale": float("nan")}, "scale must be a finite positive number: got nan"),
    ],
)
def test_route_refuses_bad_input(shape, k, options, message):
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(shape), k, **options)


@pytest.mark.parametrize("logits", [torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool), [[0.0]]])
def test_logits_must_be_floating_point(logits):
    for function in (score, lambda logits: route(logits, 1)):
        with pytest.raises(ValueError, match="logits must be a tensor of floating point numbers: got (torch|list)"):
            function(logits)


def test_numbers_of_other_libraries_and_tensors_are_taken():
    logits = torch.randn(3, 4)
    scaled = route(logits, np.int64(2), scale=torch.tensor(2.0))
    assert torch.equal(scaled.weights, route(logits, 2, scale=2.0).weights)
