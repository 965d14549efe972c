import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from equipoise import Frozen, LossFree
from equipoise.balancers import LayerStack
from equipoise.load import expert_load
from equipoise.metrics import max_violation
from equipoise.routing import SCORE_FUNCTIONS, route

ADDED = ["sign", "proportional", "rms", "momentum"]
rules = pytest.mark.parametrize("rule", ADDED)
centers = pytest.mark.parametrize("center", [True, False])


def _prepared(bias, score_function="sigmoid", k=2, **options):
    balancer = LossFree(**options)
    balancer.prepare(LayerStack(score_function, k, bias))
    return balancer


def test_sign_rule_by_hand():
    # mean 3: -, +, +, +; centred: the mean sign is 1/2
    load = torch.tensor([[6, 2, 2, 2]])
    plain = _prepared(torch.zeros(1, 4), rate=0.5, rule="sign", center=False)
    plain.update(load)
    assert_close(plain.bias(), torch.tensor([[-0.5, 0.5, 0.5, 0.5]]))
    centred = _prepared(torch.zeros(1, 4), rate=0.5, rule="sign")
    centred.update(load)
    assert_close(centred.bias(), torch.tensor([[-0.75, 0.25, 0.25, 0.25]]))


def test_proportional_rule_by_hand():
    # mean 2: errors (2 - 6)/2, (2 - 1)/2, (2 - 1)/2, (2 - 0)/2
    balancer = _prepared(torch.zeros(1, 4), rate=0.1, rule="proportional")
    balancer.update(torch.tensor([[6, 1, 1, 0]]))
    assert_close(balancer.bias(), torch.tensor([[-0.2, 0.05, 0.05, 0.1]]))


def test_rms_rule_by_hand():
    # errors -3, 1, 1, 1: root of the mean square is sqrt(12/4)
    balancer = _prepared(torch.zeros(1, 4), rate=0.1, rule="rms")
    balancer.update(torch.tensor([[6, 2, 2, 2]]))
    assert_close(balancer.bias(), 0.1 / math.sqrt(3) * torch.tensor([[-3.0, 1, 1, 1]]))


def test_momentum_rule_by_hand():
    # mean 2: v = -1, 1/2, 1/2, 0; tanh(2 v), centred; half of it in the first step, then 1/2 m + 1/2 d
    balancer = _prepared(torch.zeros(1, 4), rate=0.1, rule="momentum")
    load = torch.tensor([[4, 1, 1, 2]])
    clamped = torch.tensor([-math.tanh(2), math.tanh(1), math.tanh(1), 0])
    d = 0.1 * (clamped - clamped.mean())
    balancer.update(load)
    assert_close(balancer.state()["momentum"][0], d / 2)
    balancer.update(load)
    assert_close(balancer.state()["momentum"][0], d * 3 / 4)
    assert_close(balancer.bias()[0], d / 2 + d * 3 / 4)


def test_multiplicative_rule_by_hand():
    # factors 1/2, 3/2, 3/2, 3/2; centred: divided by their mean 5/4
    plain = _prepared(torch.zeros(1, 4), rate=0.5, rule="multiplicative", center=False)
    plain.update(torch.tensor([[6, 2, 2, 2]]))
    assert_close(plain.bias(), torch.tensor([[-0.5, 0.5, 0.5, 0.5]]))
    centred = _prepared(torch.zeros(1, 4), rate=0.5, rule="multiplicative")
    centred.update(torch.tensor([[6, 2, 2, 2]]))
    assert_close(centred.bias(), torch.tensor([[-0.6, 0.2, 0.2, 0.2]]))
    for _ in range(9):
        plain.update(torch.tensor([[6, 2, 2, 2]]))
    assert plain.bias()[0, 0] == -1.0  # a factor of 0: below it the worst score would win


def test_micro_batch_signs_by_hand():
    # signs (-, +, +, +), (+, -, +, +) and an empty micro-batch: means 0, 0, 1, 1; centred: minus 1/2
    balancer = _prepared(torch.zeros(1, 4), rate=0.5, rule="sign", scope="micro_batch")
    loads = [torch.tensor([[6, 2, 2, 2]]), torch.tensor([[0, 9, 1, 1]]), torch.zeros(1, 4, dtype=torch.int64)]
    statistic = sum(balancer.micro_batch_statistic(load) for load in loads)
    assert statistic.tolist() == [[0, 0, 2, 2, 2]]
    balancer.update(sum(loads), statistic)
    assert_close(balancer.bias(), torch.tensor([[-0.25, -0.25, 0.25, 0.25]]))
    with pytest.raises(ValueError, match="must have the signs of the micro-batches"):
        balancer.update(sum(loads))


@centers
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_micro_batch_signs_equal_the_reference(center, dtype, atol):
    generator = torch.Generator().manual_seed(1)
    balancer = _prepared(torch.zeros(2, 6, dtype=dtype), rate=1e-2, rule="sign", scope="micro_batch", center=center)
    expected = torch.zeros(2, 6).tolist()
    for number in range(20):
        loads = torch.randint(0, 12, (5, 2, 6), generator=generator)
        loads[number % 5] = 0
        statistic = sum(balancer.micro_batch_statistic(load) for load in loads)
        balancer.update(loads.sum(0), statistic)
        expected = [
            reference.micro_batch_sign_rule(b, loads[:, layer].tolist(), 1e-2, center)
            for layer, b in enumerate(expected)
        ]
    assert_close(balancer.bias(), torch.tensor(expected, dtype=dtype), rtol=0, atol=atol)


@centers
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_momentum_equals_the_reference(center, dtype, atol, beta):
    generator = torch.Generator().manual_seed(1)
    options = dict(rule="momentum", momentum=beta, sharpness=1.5, center=center)
    balancer = _prepared(torch.zeros(2, 6, dtype=dtype), rate=1e-2, **options)
    expected = [([0.0] * 6, [0.0] * 6)] * 2
    for number in range(20):
        load = torch.randint(0, 12, (2, 6), generator=generator)
        if number == 3:
            load[0] = 0  # nothing counted: what is left of the last step
        balancer.update(load)
        expected = [
            reference.momentum_rule(b, m, c, 1e-2, beta, 1.5, center)
            for (b, m), c in zip(expected, load.tolist(), strict=True)
        ]
    assert_close(balancer.bias(), torch.tensor([b for b, _ in expected], dtype=dtype), rtol=0, atol=atol)
    assert_close(balancer.state()["momentum"], torch.tensor([m for _, m in expected], dtype=dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("schedule", ["constant", "linear", "drop"])
def test_schedules_equal_the_reference(schedule):
    zero_from = None if schedule == "constant" else 10
    balancer = _prepared(torch.zeros(1, 2), rate=0.5, rule="sign", schedule=schedule, zero_from=zero_from)
    previous = 0.0
    for window in range(15):
        balancer.update(torch.tensor([[3, 1]]), None, window)
        rate = reference.rate_at(0.5, window, schedule, 10)
        assert balancer.rate_at(window) == rate
        assert_close(balancer.bias()[0, 1].item() - previous, rate, rtol=0, atol=1e-6)
        previous = balancer.bias()[0, 1].item()
    # by hand: linear 0.5 * (10 + 9 + ... + 1) / 10, drop 0.5 * 10
    assert_close(previous, {"constant": 7.5, "linear": 2.75, "drop": 5.0}[schedule], rtol=0, atol=1e-5)


def test_prepare_sets_the_default_rule_for_the_score_function():
    balancer = LossFree()
    balancer.prepare(LayerStack("softmax", 1, torch.zeros(1, 2)))
    assert balancer.rule == "proportional" and not balancer.multiplies
    assert LossFree(rule="multiplicative").multiplies


def test_algorithm_1_of_the_paper():
    """Wang et al. 2024, Algorithm 1: c_i assigned, c-bar mean, e_i = c-bar - c_i, b_i += u * sign(e_i)."""
    generator = torch.Generator().manual_seed(0)
    balancer = _prepared(torch.zeros(1, 8), rate=1e-3, rule="sign", center=False)
    b = [0.0] * 8
    for _ in range(20):
        load = torch.randint(0, 50, (1, 8), generator=generator)
        balancer.update(load)
        c = load[0].tolist()
        e = [sum(c) / 8 - ci for ci in c]
        b = [bi + 1e-3 * ((ei > 0) - (ei < 0)) for bi, ei in zip(b, e, strict=True)]
    assert_close(balancer.bias()[0], torch.tensor(b), rtol=0, atol=1e-8)  # float32 sums of 20 steps


@pytest.mark.parametrize("rule", ["sign", "proportional", "rms", "multiplicative"])
@centers
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])  # 30 roundings
def test_update_equals_the_reference(rule, center, dtype, atol):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    if rule == "multiplicative":  # factors around 1
        start = 0.2 * start.tanh()
    balancer = _prepared(start.to(dtype), rate=1e-2, rule=rule, center=center)
    expected = start.tolist()
    step = getattr(reference, f"{rule}_rule")
    for number in range(30):
        load = torch.randint(0, 40, (3, 6), generator=generator)
        if number == 7:
            load[1] = 0
        balancer.update(load)
        expected = [step(b, c, 1e-2, center) for b, c in zip(expected, load.tolist(), strict=True)]
    assert_close(balancer.bias(), torch.tensor(expected, dtype=dtype), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("score_function", "rule"), [("softmax", "proportional"), ("sigmoid", "sign"), ("sqrt_softplus", "sign")]
)
def test_the_default_rule_depends_on_the_score_function(score_function, rule):
    assert _prepared(torch.zeros(1, 4), score_function).rule == rule
    other = "sign" if rule == "proportional" else "proportional"
    assert _prepared(torch.zeros(1, 4), score_function, rule=other).rule == other


@pytest.mark.parametrize("base", [2**53, 10**16])
def test_the_sign_is_exact_where_floats_round(base):
    # counts differ by one in 10^16: float64 does not see it
    load = torch.tensor([[base + 1, base, base, base]])
    assert load.double().mean() == load.double()[0, 1]
    balancer = _prepared(torch.zeros(1, 4), rate=1.0, rule="sign", center=False)
    balancer.update(load)
    assert balancer.bias().tolist() == [[-1.0, 1.0, 1.0, 1.0]]
    balancer.update(torch.tensor([[base, base, base, base]]))
    assert balancer.bias().tolist() == [[-1.0, 1.0, 1.0, 1.0]]


@rules
@centers
def test_a_load_at_balance_and_a_load_without_tokens_move_nothing(rule, center):
    start = torch.tensor([[0.3, -0.1, 0.0]])
    balancer = _prepared(start, rate=0.1, rule=rule, center=center)
    for load in ([[7, 7, 7]], [[0, 0, 0]]):
        balancer.update(torch.tensor(load))
        assert torch.equal(balancer.bias(), start)


@rules
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_centred_steps_sum_to_zero_and_permute(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    load = torch.randint(0, 1000, (2, 7), generator=generator)
    order = torch.randperm(7, generator=generator)
    biases = []
    for counts in (load, load[:, order]):
        balancer = _prepared(torch.zeros(2, 7), rate=1.0, rule=rule)
        balancer.update(counts)
        assert_close(balancer.bias().sum(-1), torch.zeros(2), rtol=0, atol=5e-6)  # float32 sums of 7 terms to 7
        biases.append(balancer.bias())
    assert_close(biases[1], biases[0][:, order], rtol=0, atol=1e-6)


@rules
def test_layers_do_not_mix(rule):
    load = torch.tensor([[9, 0, 0], [1, 4, 7]])
    both = _prepared(torch.zeros(2, 3), rate=0.1, rule=rule)
    both.update(load)
    for row in range(2):
        one = _prepared(torch.zeros(1, 3), rate=0.1, rule=rule)
        one.update(load[row : row + 1])
        assert torch.equal(one.bias()[0], both.bias()[row])


@pytest.mark.parametrize(
    ("score_function", "rule", "rate"),
    [
        ("sigmoid", "sign", 0.01),
        ("sqrt_softplus", "sign", 0.02),
        ("softmax", "proportional", 0.02),
        ("sigmoid", "rms", 0.01),
        ("softmax", "rms", 0.003),
        ("sigmoid", "momentum", 0.02),
    ],
)
@pytest.mark.parametrize("center", [True, False])
def test_a_skewed_router_evens_out(score_function, rule, rate, center):
    generator, skew = torch.Generator().manual_seed(0), torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
    balancer, history = _prepared(torch.zeros(1, 8), score_function, rate=rate, rule=rule, center=center), []
    for _ in range(200):
        logits = torch.randn(512, 8, generator=generator) + skew
        load = expert_load(route(logits, 2, score_function=score_function, bias=balancer.bias()[0]).expert_ids, 8)
        history.append(float(max_violation(load)))
        balancer.update(load[None])
    assert history[0] > 1.5, "the input is not skewed: the test proves nothing"
    assert sum(history[-20:]) / 20 < 0.3  # floor 0.11, plus the swing of the rate


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_the_bias_is_a_copy_of_the_start_and_moves_in_place(score_function):
    start = torch.zeros(1, 3)
    balancer = _prepared(start, score_function, rate=0.1)
    bias = balancer.bias()
    balancer.update(torch.tensor([[9, 0, 0]]))
    assert balancer.bias() is bias and bias[0, 0] < 0
    assert torch.equal(start, torch.zeros(1, 3))


def test_frozen_never_moves():
    balancer = Frozen()
    balancer.prepare(LayerStack("softmax", 1, torch.tensor([[0.5, -0.5]])))
    balancer.update(torch.tensor([[100, 0]]))
    assert balancer.bias().tolist() == [[0.5, -0.5]]
    assert balancer.has_bias and not balancer.has_loss


@pytest.mark.parametrize("rate", [0, -1e-3, math.inf, math.nan, "fast", True, None])
def test_rate_must_be_finite_and_above_zero(rate):
    with pytest.raises(ValueError, match="rate must be (a finite number|above 0): got"):
        LossFree(rate=rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "cubic"}, "rule must be one of sign, proportional, rms, multiplicative, momentum: got 'cubic'"),
        ({"center": 1.0}, "center must be true or false: got 1.0"),
        ({"rate": 0}, "To switch balancing off, use the strategy none"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossFree(**options)


@pytest.mark.parametrize("load", [torch.zeros(1, 3).long(), torch.zeros(4).long(), torch.zeros(1, 4)])
def test_update_refuses_another_shape_or_dtype(load):
    with pytest.raises(ValueError, match=r"int64 count per expert of each layer: expected shape \(1, 4\)"):
        _prepared(torch.zeros(1, 4)).update(load)


def test_notes_say_that_a_run_is_too_short():
    (note,) = LossFree(rate=1e-3, rule="sign").notes(100)
    assert "100 steps" in note and "rate 0.001" in note and "at most 0.1 before" in note and "take 0.01." in note
    for rate, num_steps in ((1e-3, 10_000), (1e-2, 100), (1e-2, 1000)):
        assert LossFree(rate=rate, rule="sign").notes(num_steps) == []
    assert LossFree(rate=1e-3, rule="proportional").notes(100) == []
    (note,) = LossFree(rate=1e-3, rule="multiplicative").notes(100)
    assert "a factor moves by at most 0.1, from 1" in note
    assert LossFree(rate=1e-3, rule="multiplicative").notes(500) == []
    (note,) = LossFree(rate=1e-3, rule="momentum").notes(100)
    assert "a bias moves by at most 0.1" in note
    (note,) = LossFree(rate=0.5, rule="sign").notes(1000)
    assert "swings" in note and LossFree(rate=0.1, rule="sign").notes(1000) == []
    (note,) = LossFree(rate=1e-2, rule="sign", schedule="drop", zero_from=20).notes(1000)
    assert "1000 steps" in note and "at most 0.2" in note and "take more steps or a larger rate" in note


def test_notes_on_a_sigmoid_score_are_given_for_sigmoid_scores_only():
    assert len(_prepared(torch.zeros(1, 8), "sigmoid", rate=1e-3).notes(100)) == 1
    for rate in (1e-3, 0.5):
        assert _prepared(torch.zeros(1, 8), "sqrt_softplus", rate=rate, rule="sign").notes(100) == []


def test_a_run_of_no_steps_has_a_note_too():
    (note,) = LossFree(rate=1e-3, rule="sign").notes(0)
    assert "In 0 steps" in note and "take 1." in note


def test_notes_say_how_large_a_step_is_on_softmax_scores():
    (note,) = _prepared(torch.zeros(1, 128), "softmax", rate=1e-3, rule="sign").notes(100)
    assert "128 experts a step of 0.001 is 13% of a mean score" in note  # the paper's own example, appendix C
    assert _prepared(torch.zeros(1, 128), "softmax", rate=1e-3).notes(100) == []
    assert _prepared(torch.zeros(1, 8), "softmax", rate=1e-3, rule="sign").notes(100) == []  # 1 % of a mean score
    assert "softmax" not in str(_prepared(torch.zeros(1, 128), "sigmoid", rate=1e-3).notes(100))
