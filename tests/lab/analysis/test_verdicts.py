import math
from itertools import combinations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise_lab.analysis import Estimate, Hypothesis, estimate, holm, judge, judge_family

LOWER, HIGHER = Hypothesis("lower"), Hypothesis("higher")


def _equal(margin):
    return Hypothesis("equal", margin=margin)


# n = 9 and sd = 3: the standard error is 1, the interval mean ± 2.306
@pytest.mark.parametrize(
    ("hypothesis", "mean", "verdict"),
    [
        (LOWER, -2.31, "supported"),
        (LOWER, -2.30, "undecided"),
        (LOWER, 2.30, "undecided"),
        (LOWER, 2.31, "not supported"),
        (HIGHER, 2.31, "supported"),
        (HIGHER, 2.30, "undecided"),
        (HIGHER, -2.31, "not supported"),
        (_equal(3.0), 0.0, "supported"),
        (_equal(3.0), 0.69, "supported"),
        (_equal(3.0), -0.69, "supported"),
        (_equal(3.0), 0.70, "undecided"),
        (_equal(3.0), -0.70, "undecided"),
        (_equal(3.0), 5.30, "undecided"),
        (_equal(3.0), 5.31, "not supported"),
        (_equal(3.0), -5.31, "not supported"),
        (_equal(1.0), 0.0, "undecided"),  # the interval contains both margins
    ],
)
def test_verdict_by_hand(hypothesis, mean, verdict):
    assert judge(Estimate(n=9, mean=mean, sd=3.0), hypothesis).verdict == verdict


def test_p_by_hand():
    """Three seeds, standard error 1: with two degrees P(T > t) = (1 - t / sqrt(2 + t^2)) / 2."""

    def beyond(t):
        return (1 - t / math.sqrt(2 + t * t)) / 2

    lower = judge(Estimate(n=3, mean=-2.0, sd=math.sqrt(3)), LOWER)
    assert lower.p == lower.p_adjusted == pytest.approx(2 * beyond(2))
    assert lower.p_one_sided == pytest.approx(beyond(2))
    higher = judge(Estimate(n=3, mean=-2.0, sd=math.sqrt(3)), HIGHER)
    assert (higher.p, higher.p_one_sided) == (pytest.approx(2 * beyond(2)), pytest.approx(1 - beyond(2)))
    equal = judge(Estimate(n=3, mean=1.0, sd=math.sqrt(3)), _equal(4.0))  # 3 from one margin, 5 from the other
    assert (equal.p, equal.p_one_sided) == (pytest.approx(2 * beyond(3)), pytest.approx(beyond(3)))
    apart = judge(Estimate(n=3, mean=7.0, sd=math.sqrt(3)), _equal(4.0))
    assert (apart.p, apart.p_one_sided) == (pytest.approx(2 * beyond(3)), pytest.approx(1 - beyond(3)))


estimates = st.builds(
    Estimate,
    n=st.integers(1, 12),
    mean=st.floats(-5, 5),
    sd=st.floats(0.01, 5),
    level=st.sampled_from([0.8, 0.9, 0.95, 0.99]),
)
hypotheses = st.sampled_from([LOWER, HIGHER]) | st.floats(0.01, 3).map(_equal)


@settings(max_examples=150, deadline=None)
@given(estimates, hypotheses)
def test_the_interval_and_the_p_decide_alike(mean, hypothesis):
    judgement = judge(mean, hypothesis)
    if abs(judgement.p - (1 - mean.level)) > 1e-9:
        assert (judgement.verdict != "undecided") == (judgement.p < 1 - mean.level)
    if abs(judgement.p_one_sided - (1 - mean.level) / 2) > 1e-9:
        assert (judgement.verdict == "supported") == (judgement.p_one_sided < (1 - mean.level) / 2)


@settings(max_examples=100, deadline=None)
@given(estimates, hypotheses, st.sampled_from([0.25, 4.0]))
def test_the_mirror_image_and_the_unit_change_nothing(mean, hypothesis, scale):
    mirror = {"lower": HIGHER, "higher": LOWER, "equal": hypothesis}[hypothesis.direction]
    mirrored = judge(Estimate(mean.n, -mean.mean, mean.sd, mean.level), mirror)
    other = hypothesis if hypothesis.margin is None else _equal(hypothesis.margin * scale)
    scaled = judge(Estimate(mean.n, mean.mean * scale, mean.sd * scale, mean.level), other)
    plain = judge(mean, hypothesis)
    assert plain.verdict == mirrored.verdict == scaled.verdict
    assert plain.p == pytest.approx(mirrored.p) == pytest.approx(scaled.p)


def test_one_seed_is_undecided():
    for hypothesis in (LOWER, HIGHER, _equal(100.0)):
        judgement = judge(estimate([-50.0]), hypothesis)
        assert (judgement.verdict, judgement.p, judgement.p_one_sided) == ("undecided", 1.0, 1.0)


def test_arms_that_are_equal_bit_for_bit_are_judged_equal():
    same = estimate([0.0, 0.0, 0.0])
    assert judge(same, _equal(1e-9)).verdict == "supported"
    assert judge(same, LOWER).verdict == "undecided"
    assert judge(estimate([0.5, 0.5]), _equal(0.25)).verdict == "not supported"


@pytest.mark.parametrize(
    ("hypothesis", "mean", "most"),
    [(LOWER, 0.0, 0.025), (_equal(1.0), 1.0, 0.025), (_equal(1.0), -1.0, 0.025)],
    ids=["difference", "above the margin", "below the margin"],
)
def test_a_claim_that_is_just_false_is_supported_as_often_as_the_level_says(hypothesis, mean, most):
    """The one-sided level is (1 - level) / 2: for equality not the 5 % of a usual TOST."""
    repetitions = 2000
    samples = numpy.random.default_rng(4).normal(mean, 0.6, (repetitions, 8)).tolist()
    supported = sum(judge(estimate(sample), hypothesis).verdict == "supported" for sample in samples)
    assert abs(supported / repetitions - most) < 4 * math.sqrt(most * (1 - most) / repetitions)


@pytest.mark.parametrize("margin", [None, 0, 0.0, -0.1, math.nan, math.inf])
def test_an_invalid_margin_raises(margin):
    with pytest.raises(
        ValueError, match=r"must have a finite margin above 0: got margin=.*Give the largest difference"
    ):
        Hypothesis("equal", margin=margin)


def test_an_invalid_claim_raises():
    with pytest.raises(ValueError, match="must be 'lower', 'higher' or 'equal': got 'less'"):
        Hypothesis("less")
    with pytest.raises(ValueError, match="Only a claim of equality has a margin: got margin=0.1"):
        Hypothesis("lower", margin=0.1)


# ---------------------------------------------------------------------------------------------------------
# Holm


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})  # 4 p, 3 p, 2 p, and b not below c
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.03}) == {"a": 0.03}


def _closed(p_values):
    """Holm by the closure principle: the largest Bonferroni p over all sets of hypotheses that contain the one."""
    names = list(p_values)
    return {
        name: max(
            min(1.0, len(chosen) * min(p_values[other] for other in chosen))
            for size in range(1, len(names) + 1)
            for chosen in combinations(names, size)
            if name in chosen
        )
        for name in names
    }


families = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.02, 1.0]), min_size=1, max_size=6).map(
    lambda p: dict(zip("abcdef", p, strict=False))
)


@settings(max_examples=100, deadline=None)
@given(families)
def test_holm_equals_the_closed_tests(p_values):
    assert holm(p_values) == pytest.approx(_closed(p_values))


@settings(max_examples=100, deadline=None)
@given(families)
def test_holm_keeps_the_order_and_lies_between_the_p_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1, len(p_values) * p)
        assert all(adjusted[name] <= adjusted[other] for other in p_values if p < p_values[other])
    assert holm(dict(reversed(p_values.items()))) == adjusted


def test_holm_bounds_the_error_of_a_family():
    """Three false claims and a true one, dependent through a common baseline. With Holm at most 5 % of families have an
    error; without Holm, far more."""
    generator = numpy.random.default_rng(5)
    repetitions, without, within = 400, 0, 0
    for _ in range(repetitions):
        baseline = generator.normal(0, 1, 6)
        arms = {name: (generator.normal(0, 1, 6) - baseline).tolist() for name in "abc"}
        arms["true"] = (generator.normal(-9, 1, 6) - baseline).tolist()
        alone = {name: judge(estimate(values), LOWER) for name, values in arms.items()}
        family = judge_family(alone)
        without += any(alone[name].verdict != "undecided" for name in "abc")
        within += any(family[name].verdict != "undecided" for name in "abc")
        assert family["true"].verdict == "supported"
    tolerance = 4 * math.sqrt(0.05 * 0.95 / repetitions)
    assert 0.02 < within / repetitions < 0.05 + tolerance
    assert without / repetitions > 0.05 + tolerance


def test_a_verdict_that_does_not_survive_is_undecided():
    """n = 9, standard error 1. p is 0.0085, 0.022, 0.022 and 0.35; with Holm 0.034, 0.065, 0.065 and 0.35."""
    alone = {
        "weak": judge(Estimate(n=9, mean=2.84, sd=3.0), LOWER),
        "strong": judge(Estimate(n=9, mean=-3.45, sd=3.0), LOWER),
        "equal": judge(Estimate(n=9, mean=0.0, sd=3.0), _equal(2.84)),
        "open": judge(Estimate(n=9, mean=1.0, sd=3.0), HIGHER),
    }
    assert [each.verdict for each in alone.values()] == ["not supported", "supported", "supported", "undecided"]
    family = judge_family(alone)
    assert list(family) == list(alone)
    assert [each.verdict for each in family.values()] == ["undecided", "supported", "undecided", "undecided"]
    assert [family[name].p for name in family] == [alone[name].p for name in alone]
    assert family["strong"].p_adjusted == pytest.approx(4 * alone["strong"].p)
    assert family["weak"].p_adjusted == pytest.approx(3 * alone["weak"].p)
    assert family["open"].p_adjusted == alone["open"].p
    assert judge_family(family) == family
    assert judge_family({"weak": family["weak"]}) == {"weak": alone["weak"]}  # a family of one


def test_a_claim_without_data_counts():
    strong = judge(Estimate(n=9, mean=-2.5, sd=3.0), LOWER)
    family = judge_family({"strong": strong, "not run": judge(estimate([0.0]), LOWER)})
    assert (strong.verdict, family["strong"].verdict) == ("supported", "undecided")


def test_looks_multiply_p_before_holm():
    """p is 0.0085 and 0.022. Looked at twice: 0.017 and 0.044, and Holm doubles the smaller one: 0.034 and 0.044."""
    strong, weak = (judge(Estimate(n=9, mean=mean, sd=3.0), LOWER) for mean in (-3.45, -2.84))
    family = judge_family({"strong": strong, "weak": weak}, looks={"strong": 2, "weak": 2})
    assert family["strong"].p_adjusted == pytest.approx(4 * strong.p)
    assert family["weak"].p_adjusted == pytest.approx(max(2 * weak.p, 4 * strong.p))
    assert {each.verdict for each in family.values()} == {"supported"}
    assert judge_family({"weak": weak}, looks={"weak": 3})["weak"].verdict == "undecided"


@pytest.mark.parametrize("counts_looks", [True, False])
def test_looks_keep_the_error_of_a_family_that_stops_when_it_is_decided(counts_looks):
    """Four claims with no true difference and a common baseline, judged after 4, 8 and 16 seeds; a decided one stops.

    If looks count, at most 5 % of families have an error. If they do not, clearly more."""
    generator = numpy.random.default_rng(7)
    repetitions, errors, looks = 800, 0, (4, 8, 16)
    for _ in range(repetitions):
        baseline = generator.normal(0, 1, looks[-1])
        arms = {name: generator.normal(0, 1, looks[-1]) - baseline for name in "abcd"}
        seeds = dict.fromkeys(arms, 0)
        verdicts = dict.fromkeys(arms, "undecided")
        for look in looks:
            seeds |= {name: look for name, verdict in verdicts.items() if verdict == "undecided"}
            alone = {name: judge(estimate(arms[name][:n].tolist()), LOWER) for name, n in seeds.items()}
            family = judge_family(alone, looks=dict.fromkeys(arms, len(looks)) if counts_looks else None)
            verdicts = {name: judgement.verdict for name, judgement in family.items()}
        errors += any(verdict != "undecided" for verdict in verdicts.values())
    tolerance = 3 * math.sqrt(0.05 * 0.95 / repetitions)
    if counts_looks:
        assert errors / repetitions < 0.05 + tolerance
    else:
        assert errors / repetitions > 0.05 + tolerance


def test_an_invalid_family_raises():
    one, other = (judge(Estimate(n=3, mean=1.0, sd=1.0, level=level), LOWER) for level in (0.9, 0.95))
    with pytest.raises(ValueError, match=r"one level: got \[0\.9, 0\.95\]"):
        judge_family({"a": one, "b": other})
    for empty in (holm, judge_family):
        with pytest.raises(ValueError, match="at least one p value: got none"):
            empty({})
    for p in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"between 0 and 1: got .* for 'a'"):
            holm({"a": p})
