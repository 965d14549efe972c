import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise_lab.analysis import (
    MAX_SEEDS,
    Hypothesis,
    detectable_effect,
    estimate,
    judge,
    noise,
    paired_differences,
    power,
    seeds_needed,
)

LOWER, HIGHER = Hypothesis("lower"), Hypothesis("higher")


def _equal(margin):
    return Hypothesis("equal", margin=margin)


# ---------------------------------------------------------------------------------------------------------
# reference: `math` only; sample mean and sample variance are independent, so two sums


T95 = {1: 12.706204736, 2: 4.302652730, 3: 3.182446305, 5: 2.570581836, 9: 2.262157163, 33: 2.034515297}  # a table
T90 = {1: 6.313751515, 2: 2.919985580, 3: 2.353363435, 5: 2.015048373, 9: 1.833112933, 33: 1.692360309}


def _power(hypothesis, mean, sd, n, t):
    """The probability that the interval lies inside, summed over the sample's standard deviation s."""
    error, df, pieces = sd / math.sqrt(n), n - 1, 4000

    def below(x):
        return 0.5 * math.erfc(-(x - mean) / error / math.sqrt(2))  # P(sample mean < x)

    total, end = 0.0, 1 + 9 / math.sqrt(2 * df)  # of s / sd
    for i in range(pieces):
        u = end * (i + 0.5) / pieces
        log = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * math.log(u) - df * u * u / 2
        reach = t * u * error
        if hypothesis.direction == "lower":
            inside = below(-reach)
        elif hypothesis.direction == "higher":
            inside = 1 - below(reach)
        else:
            inside = max(0.0, below(hypothesis.margin - reach) - below(reach - hypothesis.margin))
        total += math.exp(log) * inside * end / pieces
    return total


@pytest.mark.parametrize("n", [2, 3, 4, 6, 10, 34])
@pytest.mark.parametrize(
    ("hypothesis", "mean"),
    [
        (LOWER, -0.5),
        (LOWER, 0.0),
        (LOWER, 0.7),
        (HIGHER, 2.0),
        (_equal(1.0), 0.0),
        (_equal(1.0), 0.4),
        (_equal(1.0), -0.4),
        (_equal(1.0), 1.3),
        (_equal(20.0), 3.0),
    ],
    ids=str,
)
def test_power_equals_the_reference(hypothesis, mean, n):
    for level, t in ((0.95, T95), (0.9, T90)):
        expected = _power(hypothesis, mean, 1.0, n, t[n - 1])
        assert power(hypothesis, mean, 1.0, n, level=level) == pytest.approx(expected, abs=2e-5)  # the midpoint rule


def test_power_by_hand():
    """At a true difference of 0, power is the one-sided level. Without noise it is 0 or 1."""
    for n in (2, 5, 50):
        assert power(LOWER, 0.0, 1.0, n) == pytest.approx(0.025)
        assert power(HIGHER, 0.0, 1.0, n, level=0.9) == pytest.approx(0.05)
    assert power(LOWER, -1e-9, 0.0, 2) == power(_equal(0.1), 0.09, 0.0, 2) == 1.0
    assert power(LOWER, 1e-9, 0.0, 2) == power(_equal(0.1), -0.1, 0.0, 2) == 0.0
    assert power(LOWER, -9.0, 1.0, 1) == power(_equal(9.0), 0.0, 1.0, 1) == 0.0
    assert power(LOWER, -1e300, 1e-300, 2) == 1.0


@settings(max_examples=15, deadline=None)
@given(st.floats(-3, 3), st.floats(0.1, 3), st.integers(2, 40), st.floats(0.05, 3))
def test_invariants_of_power(mean, sd, n, margin):
    for hypothesis, mirror, scaled in ((LOWER, HIGHER, LOWER), (_equal(margin), _equal(margin), _equal(4 * margin))):
        result = power(hypothesis, mean, sd, n)
        assert 0 <= result <= 1
        assert power(mirror, -mean, sd, n) == pytest.approx(result, abs=1e-9)
        assert power(scaled, 4 * mean, 4 * sd, n) == pytest.approx(result, abs=1e-9)
    assert power(_equal(margin), mean, sd, n) <= power(_equal(1.5 * margin), mean, sd, n) + 1e-9
    assert power(LOWER, mean, sd, n) >= power(LOWER, mean + 0.1, sd, n) - 1e-9


@pytest.mark.parametrize(
    ("hypothesis", "mean", "n"),
    [(LOWER, -0.9, 5), (HIGHER, 1.5, 4), (_equal(1.6), 0.2, 6), (_equal(2.0), 0.0, 4)],
    ids=str,
)
def test_power_is_how_often_a_claim_is_supported(hypothesis, mean, n):
    repetitions = 1500
    samples = numpy.random.default_rng(6).normal(mean, 1.0, (repetitions, n)).tolist()
    supported = sum(judge(estimate(sample), hypothesis).verdict == "supported" for sample in samples) / repetitions
    result = power(hypothesis, mean, 1.0, n)
    assert 0.2 < result < 0.9
    assert abs(supported - result) < 4 * math.sqrt(result * (1 - result) / repetitions)


# ---------------------------------------------------------------------------------------------------------
# seeds needed


@pytest.mark.parametrize(
    ("effect", "level", "wanted", "n"),
    # one-sample t tests as tabled: d = 0.2, 0.5, 0.8 (Cohen's small, medium, large), two-sided 5 %
    [(0.2, 0.95, 0.8, 199), (0.5, 0.95, 0.8, 34), (0.8, 0.95, 0.8, 15), (0.5, 0.95, 0.9, 44), (0.5, 0.99, 0.8, 51)],
)
def test_seeds_needed_are_those_of_the_tables(effect, level, wanted, n):
    assert seeds_needed(HIGHER, effect, 1.0, power=wanted, level=level) == n
    assert seeds_needed(LOWER, -effect, 1.0, power=wanted, level=level) == n


@pytest.mark.parametrize(
    ("hypothesis", "mean", "sd"),
    [(LOWER, -1.0, 1.0), (LOWER, -8.0, 1.0), (HIGHER, 0.4, 1.0), (_equal(1.0), 0.0, 1.0), (_equal(1.0), 0.5, 1.0)],
    ids=str,
)
def test_seeds_needed_are_the_first_that_have_the_power(hypothesis, mean, sd):
    result = seeds_needed(hypothesis, mean, sd)
    first = next(n for n in range(2, 100) if power(hypothesis, mean, sd, n) >= 0.8)
    assert result == first


@pytest.mark.parametrize("wanted", [0.01, 0.0115, 0.0121, 0.03])
def test_seeds_needed_are_right_even_if_power_falls_before_it_rises(wanted):
    """A few seeds may show too little noise by chance. For a margin of half a standard deviation the power is 0.0120
    with 2 seeds, 0.0078 with 4 and 0.0122 with 8."""
    powers = [power(_equal(0.5), 0.0, 1.0, n) for n in range(2, 20)]
    assert powers[0] > powers[2] < powers[6]
    first = next(n for n, each in enumerate(powers, 2) if each >= wanted)
    assert seeds_needed(_equal(0.5), 0.0, 1.0, power=wanted) == first


def test_seeds_needed_reach_the_power_by_the_reference():
    """An effect of one standard deviation needs 10 seeds; 9 are too few. The same holds for equality within 1.2."""
    assert seeds_needed(LOWER, -1.0, 1.0) == 10
    assert _power(LOWER, -1.0, 1.0, 10, T95[9]) >= 0.8 > _power(LOWER, -1.0, 1.0, 9, 2.306004135)
    assert seeds_needed(_equal(1.2), 0.0, 1.0) == 10
    assert _power(_equal(1.2), 0.0, 1.0, 10, T95[9]) >= 0.8 > _power(_equal(1.2), 0.0, 1.0, 9, 2.306004135)


def test_weaker_evidence_needs_more_seeds():
    def needed(**changed):
        return seeds_needed(**({"hypothesis": LOWER, "mean": -0.5, "sd": 1.0, "power": 0.8, "level": 0.95} | changed))

    assert needed() < needed(mean=-0.4) and needed() < needed(sd=1.3)
    assert needed() < needed(power=0.9) and needed() < needed(level=0.99)
    assert needed(mean=-4.0, sd=8.0) == needed()
    assert (
        seeds_needed(_equal(1.0), 0.0, 1.0)
        < seeds_needed(_equal(1.0), 0.3, 1.0)
        == seeds_needed(_equal(1.0), -0.3, 1.0)
    )
    assert seeds_needed(_equal(1.0), 0.0, 1.0, level=0.9) < seeds_needed(_equal(1.0), 0.0, 1.0)


def test_on_the_wrong_side_no_number_of_seeds_is_enough():
    assert seeds_needed(LOWER, 0.1, 1.0) is None
    assert seeds_needed(LOWER, 0.0, 1.0) is None
    assert seeds_needed(HIGHER, -0.1, 1.0) is None
    assert seeds_needed(_equal(0.1), 0.1, 1.0) is None
    assert seeds_needed(_equal(0.1), -0.2, 0.0) is None


def test_seeds_needed_stop_at_the_limit():
    assert seeds_needed(LOWER, -1e-6, 1.0) == MAX_SEEDS
    assert seeds_needed(LOWER, -0.5, 1.0, limit=20) == 20
    assert seeds_needed(LOWER, -0.5, 1.0, limit=34) == seeds_needed(LOWER, -0.5, 1.0, limit=35) == 34
    assert seeds_needed(_equal(0.01), 0.0, 1.0, limit=3) == 3
    assert seeds_needed(LOWER, -1.0, 0.0) == 2


# ---------------------------------------------------------------------------------------------------------
# what can be seen


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95])
def test_the_detectable_effect_has_the_power(n, wanted):
    effect = detectable_effect(0.3, n, power=wanted)
    assert power(HIGHER, effect, 0.3, n) == pytest.approx(wanted, abs=1e-7)
    if n in (2, 3):
        assert _power(HIGHER, effect, 0.3, n, T95[n - 1]) == pytest.approx(wanted, abs=1e-3)
    assert detectable_effect(3.0, n, power=wanted) == pytest.approx(10 * effect)


def test_the_detectable_effect_by_hand():
    """Many seeds: (1.95996 + 0.84162) sd / sqrt(n)."""
    assert detectable_effect(1.0, 10_000) == pytest.approx(0.0280158, rel=1e-3)
    assert detectable_effect(1.0, 1) == math.inf
    assert detectable_effect(0.0, 5) == 0.0
    assert detectable_effect(1.0, 5, power=0.01) == 0.0  # chance alone has more power


def test_noise_by_hand():
    result = noise({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0, 2: 6.0})
    assert (result.n, result.sd_arm, result.sd_baseline, result.sd_difference) == (3, 1.0, 2.0, 1.0)
    assert result.detectable == detectable_effect(1.0, 3)
    assert (result.power, result.level) == (0.8, 0.95)


def test_noise_is_of_the_paired_differences_and_symmetric():
    generator = numpy.random.default_rng(7)
    first, second = (dict(enumerate(generator.normal(0, 1, 7).tolist())) for _ in range(2))
    result, swapped = noise(first, second, power=0.9, level=0.9), noise(second, first, power=0.9, level=0.9)
    assert result.sd_difference == paired_differences(first, second).sd == swapped.sd_difference
    assert (result.sd_arm, result.sd_baseline) == (swapped.sd_baseline, swapped.sd_arm)
    assert result.sd_arm == estimate(first.values()).sd
    assert result.detectable == swapped.detectable == detectable_effect(result.sd_difference, 7, power=0.9, level=0.9)


def test_the_noise_of_independent_arms_adds_in_squares():
    generator = numpy.random.default_rng(8)
    common = generator.normal(0, 10, 2000)
    first, second = (dict(enumerate((common + generator.normal(0, sd, 2000)).tolist())) for sd in (3.0, 4.0))
    result = noise(first, second)
    assert result.sd_difference == pytest.approx(5.0, rel=0.07)  # four standard errors
    assert result.sd_arm == pytest.approx(math.sqrt(109), rel=0.07)


def test_the_noise_of_one_seed_is_unknown():
    result = noise({0: 1.0, 1: 5.0}, {0: 2.0, 2: 3.0}, intersect=True)
    assert result.n == 1 and math.isnan(result.sd_arm) and math.isnan(result.sd_difference)
    assert result.detectable == math.inf
    with pytest.raises(ValueError, match=r"the arm lacks \[2\], the baseline lacks \[1\]"):
        noise({0: 1.0, 1: 5.0}, {0: 2.0, 2: 3.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power(LOWER, math.nan, 1.0, 3), "mean must be a finite number: got mean=nan"),
        (lambda: power(LOWER, 0.0, math.nan, 3), "sd must be a finite number, at least 0: got sd=nan"),
        (lambda: power(LOWER, 0.0, -1.0, 3), "sd must be a finite number, at least 0: got sd=-1.0"),
        (lambda: power(LOWER, 0.0, 1.0, 0), "n must be a whole number, at least 1: got n=0"),
        (lambda: power(LOWER, 0.0, 1.0, 3, level=1.0), "level must lie between 0 and 1"),
        (lambda: seeds_needed(LOWER, 1.0, math.nan), "One seed has no standard deviation"),
        (lambda: seeds_needed(LOWER, -1.0, 1.0, power=1.0), r"power must lie between 0 and 1, both excluded: got"),
        (lambda: seeds_needed(LOWER, -1.0, 1.0, limit=1), "limit must be a whole number, at least 2: got limit=1"),
        (lambda: seeds_needed(LOWER, -1.0, 1.0, level=95), "level must lie between 0 and 1"),
        (lambda: detectable_effect(math.inf, 3), "sd must be a finite number"),
        (lambda: detectable_effect(1.0, 3, power=math.nan), "power must lie between 0 and 1"),
        (lambda: detectable_effect(1.0, 0), "n must be a whole number"),
        (lambda: noise({}, {}), "the arm has none"),
        (lambda: noise({0: 1.0}, {0: 1.0}, power=80), "power must lie between 0 and 1"),
        (lambda: noise({0: 1.0}, {0: 1.0}, level=80), "level must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
