import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from equipoise import LoadBalancingLoss
from equipoise.balancers import load_balancing_loss, sequence_load_balancing_loss
from equipoise.load import expert_load
from equipoise.metrics import max_violation
from equipoise.routing import SCORE_FUNCTIONS, Routing, route, score, score_backward

score_functions = pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
normalises = pytest.mark.parametrize("normalise", [True, False])
masks = pytest.mark.parametrize("masked", [False, True])
# float64: sums of a hundred terms; float32 rounds to 6e-8
dtypes = pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])

MASK = [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]
SEQUENCES = [0] * 5 + [1] * 1 + [2] * 6


def _routing(score_function, masked=False, dtype=torch.float64, seed=0, experts=6, k=2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, experts, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.tensor(MASK, dtype=dtype) if masked else None
    routing = route(logits, k, score_function=score_function, mask=mask)
    return routing._replace(sequence_ids=torch.tensor(SEQUENCES), num_sequences=4)


def _gradient(loss, routing):
    return torch.autograd.grad(loss, routing.logits, retain_graph=True)[0]


def _matches(found, expected, atol):
    assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def test_loss_by_hand():
    # scores (.9 .3) and (.5 .5): P = (.625 .375), f = (1 0): 2 * .625; raw: P_0 = .7
    scores = torch.tensor([[0.9, 0.3], [0.5, 0.5]], dtype=torch.float64)
    routing = Routing(scores, scores, torch.tensor([[0], [0]]), scores[:, :1])
    assert float(load_balancing_loss(routing)) == pytest.approx(1.25, abs=1e-14)
    assert float(load_balancing_loss(routing, normalise=False)) == pytest.approx(1.4, abs=1e-14)
    assert float(load_balancing_loss(routing, torch.tensor([0, 7]))) == pytest.approx(0.75, abs=1e-14)
    masked = routing._replace(mask=torch.tensor([1.0, 0.0]))
    assert float(load_balancing_loss(masked)) == pytest.approx(1.5, abs=1e-14)


def test_sequence_loss_by_hand():
    # sequence 0: 1.25 on two tokens; sequence 1: f = (0 1), P_1 = .8: 1.6 on one token: (2 * 1.25 + 1.6) / 3
    scores = torch.tensor([[0.9, 0.3], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    routing = Routing(scores, scores, torch.tensor([[0], [0], [1]]), scores[:, :1], None, torch.tensor([0, 0, 1]), 2)
    assert float(sequence_load_balancing_loss(routing)) == pytest.approx(4.1 / 3, abs=1e-14)
    masked = routing._replace(mask=torch.tensor([1.0, 0.0, 1.0]))
    assert float(sequence_load_balancing_loss(masked)) == pytest.approx(1.55, abs=1e-14)


def test_gradient_by_hand():
    # one token, two experts, equal logits, f = (1 0): softmax 1/2, sigmoid 1/4, raw sigmoid 1/2 (reference._self_check)
    for score_function, normalise, expected in (
        ("softmax", True, [0.5, -0.5]),
        ("sigmoid", True, [0.25, -0.25]),
        ("sigmoid", False, [0.5, 0.0]),
    ):
        logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        load_balancing_loss(
            route(logits, 1, score_function=score_function), torch.tensor([1, 0]), normalise=normalise
        ).backward()
        _matches(logits.grad, [expected], 1e-15)


@score_functions
@normalises
@masks
@dtypes
def test_value_and_gradient_equal_the_reference(score_function, normalise, masked, dtype, atol):
    routing = _routing(score_function, masked, dtype)
    mask = MASK if masked else None
    rows, scores = routing.logits.tolist(), reference.scores(routing.logits.tolist(), score_function)
    for load in (None, torch.tensor([10, 0, 3, 5, 1, 1])):
        counts = reference.load(routing.expert_ids.tolist(), 6, mask) if load is None else load.tolist()
        loss = load_balancing_loss(routing, load, normalise=normalise)
        assert loss.dtype == dtype
        _matches(loss.detach(), reference.load_balancing_loss(scores, counts, 2, mask, normalise), atol)
        expected = reference.load_balancing_gradient(rows, counts, score_function, mask, normalise)
        _matches(_gradient(loss, routing), expected, atol)


@score_functions
@normalises
@masks
@dtypes
def test_sequence_value_and_gradient_equal_the_reference(score_function, normalise, masked, dtype, atol):
    routing = _routing(score_function, masked, dtype)
    mask = MASK if masked else None
    rows, ids = routing.logits.tolist(), routing.expert_ids.tolist()
    loss = sequence_load_balancing_loss(routing, normalise=normalise)
    expected = reference.sequence_loss(reference.scores(rows, score_function), ids, SEQUENCES, mask, normalise)
    _matches(loss.detach(), expected, atol)
    _matches(
        _gradient(loss, routing),
        reference.sequence_gradient(rows, ids, SEQUENCES, score_function, mask, normalise),
        atol,
    )


@score_functions
def test_value_at_perfect_balance_is_one(score_function):
    routing = _routing(score_function)
    assert load_balancing_loss(routing, torch.full((6,), 7)).item() == pytest.approx(1.0, abs=1e-14)
    even = route(torch.zeros(6, 3, dtype=torch.float64), 1, score_function=score_function)
    even = even._replace(sequence_ids=torch.tensor([0, 0, 0, 1, 1, 1]), num_sequences=2)
    even = even._replace(expert_ids=torch.tensor([[0], [1], [2]] * 2))
    assert float(load_balancing_loss(even)) == pytest.approx(1.0, abs=1e-14)
    assert float(sequence_load_balancing_loss(even)) == pytest.approx(1.0, abs=1e-14)


def test_value_at_collapse_is_experts_over_k():
    logits = torch.tensor([[50.0, 50.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).expand(4, 6)
    assert float(load_balancing_loss(route(logits, 2))) == pytest.approx(3.0, abs=1e-12)


@score_functions
@normalises
def test_without_tokens_loss_and_gradient_are_zero(score_function, normalise):
    for routing in (_routing(score_function)._replace(mask=torch.zeros(12, dtype=torch.float64)),):
        for loss in (
            load_balancing_loss(routing, normalise=normalise),
            sequence_load_balancing_loss(routing, normalise=normalise),
        ):
            assert loss == 0
            assert torch.equal(_gradient(loss, routing), torch.zeros(12, 6, dtype=torch.float64))
    empty = route(torch.zeros(0, 4), 2, score_function=score_function)
    assert load_balancing_loss(empty) == 0
    empty = empty._replace(sequence_ids=torch.zeros(0, dtype=torch.int64))
    assert sequence_load_balancing_loss(empty) == 0


def test_masked_tokens_get_no_gradient_and_a_mask_equals_a_slice():
    routing, kept = _routing("softmax", True), torch.tensor(MASK).bool()
    sliced = routing._replace(
        scores=routing.scores[kept],
        expert_ids=routing.expert_ids[kept],
        mask=None,
        sequence_ids=routing.sequence_ids[kept],
    )
    for function in (load_balancing_loss, sequence_load_balancing_loss):
        ours, theirs = function(routing), function(sliced)
        assert_close(ours, theirs, rtol=0, atol=1e-14)
        a, b = (torch.autograd.grad(x, routing.logits, retain_graph=True)[0] for x in (ours, theirs))
        assert_close(a, b, rtol=0, atol=1e-14)
        assert not a[~kept].any()


@score_functions
def test_a_sequence_that_is_the_whole_batch_is_the_micro_batch_loss(score_function):
    routing = _routing(score_function, True)._replace(sequence_ids=torch.zeros(12, dtype=torch.int64), num_sequences=1)
    assert_close(sequence_load_balancing_loss(routing), load_balancing_loss(routing), rtol=0, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SCORE_FUNCTIONS))
def test_permuting_experts_changes_nothing(seed, score_function):
    routing = _routing(score_function, True, seed=seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    permuted = routing._replace(scores=routing.scores[:, order], expert_ids=order.argsort()[routing.expert_ids])
    for function in (load_balancing_loss, sequence_load_balancing_loss):
        assert_close(function(permuted), function(routing), rtol=0, atol=1e-13)


def test_the_share_carries_no_gradient():
    # the derivative by the share is E * P: it would be seen if the counts were soft
    routing = _routing("softmax")
    held = load_balancing_loss(routing, expert_load(routing.expert_ids, 6))
    assert_close(_gradient(held, routing), _gradient(load_balancing_loss(routing), routing), rtol=0, atol=0)
    even = load_balancing_loss(routing, torch.full((6,), 5))
    assert_close(_gradient(even, routing), torch.zeros(12, 6, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_raw_gradient_of_sigmoid_scores_is_half_the_experts_times_as_strong():
    # about E/2 times for scores around 1/2
    logits = (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).double() * 0.01).requires_grad_()
    routing = route(logits, 4, score_function="sigmoid")
    load = torch.arange(32)
    raw, own = (_gradient(load_balancing_loss(routing, load, normalise=n), routing) for n in (False, True))
    raw = raw - raw.mean(1, keepdim=True)
    assert float(raw.norm() / own.norm()) == pytest.approx(16, rel=0.02)


@score_functions
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_a_router_of_zeros_gives_a_finite_gradient(score_function, scope):
    weight = torch.zeros(6, 4, requires_grad=True)
    hidden = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    routing = route(hidden @ weight.T, 2, score_function=score_function)
    routing = routing._replace(sequence_ids=torch.tensor(SEQUENCES), num_sequences=3)
    balancer = LoadBalancingLoss(scope=scope)
    balancer.loss(routing, expert_load(routing.expert_ids, 6)).backward()
    assert weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_balancer_is_the_loss_of_its_scope_without_the_coefficient(scope):
    routing, load = _routing("sigmoid", True), torch.tensor([5, 4, 3, 2, 1, 0])
    for normalise in (True, False):
        found = LoadBalancingLoss(7.0, scope, normalise=normalise).loss(routing, load)
        if scope == "sequence":
            assert torch.equal(found, sequence_load_balancing_loss(routing, normalise=normalise))
        else:
            assert torch.equal(found, load_balancing_loss(routing, load, normalise=normalise))


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_training_a_router_balances_it(scope):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64 * 8, 16, generator=generator) + torch.randn(16, generator=generator)
    weight = (torch.randn(8, 16, generator=generator) * 0.3).requires_grad_()
    optimizer, history = torch.optim.Adam([weight], lr=1e-2), []
    for _ in range(150):
        routing = route(hidden @ weight.T, 2)
        routing = routing._replace(sequence_ids=torch.arange(512) // 64, num_sequences=8)
        load = expert_load(routing.expert_ids, 8)
        history.append(float(max_violation(load)))
        optimizer.zero_grad()
        LoadBalancingLoss(1.0, scope).loss(routing, load).backward()
        optimizer.step()
    assert history[0] > 0.8, "the input is not skewed: the test proves nothing"
    assert sum(history[-10:]) / 10 < 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -1.0}, "coefficient must be at least 0: got -1.0"),
        ({"coefficient": math.nan}, "coefficient must be a finite number: got nan"),
        ({"coefficient": "big"}, "coefficient must be a finite number: got 'big'"),
        ({"scope": "batch"}, "scope must be one of sequence, micro_batch, global_batch: got 'batch'"),
        ({"pooling": "now"}, "pooling must be one of window, previous: got 'now'"),
        ({"normalise": "yes"}, "normalise must be true or false: got 'yes'"),
        ({"pooling": "previous", "scope": "micro_batch"}, "must go with scope=global_batch: got scope=micro_batch"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoadBalancingLoss(**options)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \(6,\), got \(3,\).*expert parallelism"):
        load_balancing_loss(_routing("softmax"), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"load must hold counts, integers: got torch.float32"):
        load_balancing_loss(_routing("softmax"), torch.full((6,), 1 / 6))
    with pytest.raises(ValueError, match="which token belongs to which sequence"):
        sequence_load_balancing_loss(_routing("softmax")._replace(sequence_ids=None))


def test_scores_that_underflow_give_a_finite_loss():
    logits = torch.full((2, 4), -200.0, requires_grad=True)
    for score_function in ("sigmoid", "sqrt_softplus"):
        loss = load_balancing_loss(route(logits, 1, score_function=score_function))
        assert loss.isfinite(), score_function
        assert torch.autograd.grad(loss, logits)[0].isfinite().all(), score_function
    assert score(logits, "softmax").isfinite().all()


def test_slopes_by_hand():
    """Four experts; the first has half of the assignments: E f = 2, 1, 1, 0. A scope without tokens has none."""
    slopes = LoadBalancingLoss().slopes(torch.tensor([[4, 2, 2, 0], [0, 0, 0, 0]]))
    assert slopes.tolist() == [[2.0, 1.0, 1.0, 0.0], [0.0] * 4] and slopes.dtype == torch.float64


@score_functions
@normalises
@masks
@pytest.mark.parametrize("load", [None, [9, 1, 0, 3, 3, 4]], ids=["own", "pooled"])
def test_the_loss_is_linear_in_the_scores_with_these_slopes(score_function, normalise, masked, load):
    routing = _routing(score_function, masked, seed=3)
    balancer = LoadBalancingLoss(normalise=normalise)
    load = expert_load(routing.expert_ids, 6, routing.mask) if load is None else torch.tensor(load)
    p = routing.scores / routing.scores.sum(-1, keepdim=True) if normalise else routing.scores
    counts = torch.ones(12, dtype=torch.bool) if routing.mask is None else routing.mask != 0
    expected = (p[counts] * balancer.slopes(load)).sum() / counts.sum()
    assert_close(balancer.loss(routing, load), expected, rtol=1e-13, atol=0)


@score_functions
def test_score_backward_equals_autograd_even_where_scores_underflow(score_function):
    logits = torch.tensor([[-300.0, 0.0, 5.0], [-120.0, -104.0, -90.0], [30.0, 88.0, 100.0]], requires_grad=True)
    scores, gradient = score(logits, score_function), torch.tensor([[1.0, -2.0, 0.5]]).expand(3, 3)
    expected = torch.autograd.grad(scores, logits, gradient)[0]
    found = score_backward(gradient, logits.detach(), scores.detach(), score_function)
    assert_close(found, expected, rtol=1e-5, atol=1e-30)
    assert score_backward(gradient, logits.detach().bfloat16(), scores.detach(), score_function).dtype == torch.bfloat16


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_masked_token_may_hold_anything(score_function, scope, normalise):
    """Padding that overflowed is as padding of zeros."""
    clean = _routing(score_function, masked=True)
    masked = clean.mask == 0
    with torch.no_grad():
        logits = clean.logits.masked_fill(masked[:, None], math.nan)
        spoilt = route(logits, 2, score_function=score_function, mask=clean.mask)
    spoilt = spoilt._replace(sequence_ids=clean.sequence_ids, num_sequences=4)
    balancer = LoadBalancingLoss(scope=scope, normalise=normalise)
    load = None if scope == "sequence" else expert_load(clean.expert_ids, 6, clean.mask)
    assert torch.equal(balancer.loss(spoilt, load), balancer.loss(clean, load).detach())
