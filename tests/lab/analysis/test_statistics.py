import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise_lab.analysis import Estimate, estimate, paired_differences, trend

# ---------------------------------------------------------------------------------------------------------
# reference: `math` only, the density integrated by Simpson's rule, quantiles by halving


def _simpson(f, start, end, pieces=2000):
    step = (end - start) / pieces
    inner = sum((4 if i % 2 else 2) * f(start + i * step) for i in range(1, pieces))
    return step / 3 * (f(start) + inner + f(end))


def _t_beyond(t, df):
    """P(T > t) of Student's t."""
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return 0.5 - _simpson(lambda x: constant * (1 + x * x / df) ** (-(df + 1) / 2), 0, t)


def _t_quantile(tail, df):
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_beyond(middle, df) > tail else (low, middle)
    return low


def _close(result, expected, tolerance=1e-9):
    assert result == pytest.approx(expected, rel=tolerance, abs=tolerance)


def _arms(n, seed=0, shift=0.0):
    generator = numpy.random.default_rng(seed)
    common, own = generator.normal(5, 0.2, n), generator.normal(0, 0.05, (2, n))
    first, second = (common + own).tolist()
    return dict(enumerate(value + shift for value in first)), dict(enumerate(second))


values = st.dictionaries(
    st.integers(0, 20),
    st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
    min_size=2,
    max_size=8,
)


# ---------------------------------------------------------------------------------------------------------
# paired differences


def test_differences_by_hand():
    """Differences 1, 2, 3: t = 2 sqrt(3), and with two degrees P(T > t) = (1 - t / sqrt(2 + t^2)) / 2."""
    result = paired_differences({3: 5.0, 4: 7.0, 9: 9.0}, {9: 6.0, 4: 5.0, 3: 4.0})
    assert (result.n, result.mean, result.sd) == (3, 2.0, 1.0)
    _close(result.standard_error, 1 / math.sqrt(3))
    t = 4.302652729911275  # sqrt(2) q / sqrt(1 - q^2), q = 0.95
    _close(t, math.sqrt(2) * 0.95 / math.sqrt(1 - 0.95**2), 1e-6)
    _close(result.interval[0], 2 - t / math.sqrt(3))
    _close(result.interval[1], 2 + t / math.sqrt(3))
    p = (1 - math.sqrt(12 / 14)) / 2
    _close(result.p_higher(), p)
    _close(result.p_lower(), 1 - p)
    _close(result.p_two_sided, 2 * p)


def test_two_seeds_by_hand():
    """With one degree P(T > t) = 1/2 - atan(t) / pi, so P(T > tan(0.475 pi) = 12.706) is 0.025."""
    result = estimate([1.0, 3.0])
    _close(result.standard_error, 1.0)
    _close(result.interval[1], 2 + math.tan(0.475 * math.pi))
    _close(result.p_two_sided, 1 - 2 * math.atan(2) / math.pi)


@pytest.mark.parametrize("n", [2, 3, 5, 9])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_and_p_equal_the_reference(n, level):
    first, second = _arms(n, seed=n, shift=0.03)
    differences = [first[seed] - second[seed] for seed in first]
    mean = sum(differences) / n
    error = math.sqrt(sum((value - mean) ** 2 for value in differences) / (n - 1) / n)
    result = paired_differences(first, second, level=level)
    _close(result.mean, mean)
    _close(result.standard_error, error)
    half_width = _t_quantile((1 - level) / 2, n - 1) * error
    _close(
        result.interval, (mean - half_width, mean + half_width), 1e-7
    )  # Simpson's rule, over as much as 12 units of t
    _close(result.p_two_sided, 2 * _t_beyond(abs(mean) / error, n - 1), 1e-7)
    for bound in (-0.02, 0.0, 0.1):
        _close(result.p_lower(bound), _t_beyond((bound - mean) / error, n - 1), 1e-7)
        _close(result.p_higher(bound), _t_beyond((mean - bound) / error, n - 1), 1e-7)


@settings(max_examples=50, deadline=None)
@given(values)
def test_swapping_the_arms_flips_the_sign(pairs):
    first, second = ({seed: pair[side] for seed, pair in pairs.items()} for side in (0, 1))
    forward, backward = paired_differences(first, second), paired_differences(second, first)
    assert (forward.mean, forward.sd) == (-backward.mean, backward.sd)
    assert forward.interval == (-backward.interval[1], -backward.interval[0])
    assert forward.p_two_sided == backward.p_two_sided
    assert forward.p_lower(0.5) == backward.p_higher(-0.5)


def test_a_common_effect_of_a_seed_cancels_and_a_scale_scales():
    first, second = _arms(6, shift=0.02)
    plain = paired_differences(first, second)
    moved = paired_differences(
        {seed: value + 3.0 * seed for seed, value in first.items()},
        {seed: value + 3.0 * seed for seed, value in second.items()},
    )
    _close((moved.mean, moved.sd, *moved.interval, moved.p_two_sided), (
        plain.mean, plain.sd, *plain.interval, plain.p_two_sided,
    ))  # fmt: skip
    scaled = paired_differences(
        {seed: 8 * value for seed, value in first.items()}, {seed: 8 * value for seed, value in second.items()}
    )
    _close((scaled.mean, scaled.sd, *scaled.interval), (
        8 * plain.mean, 8 * plain.sd, 8 * plain.interval[0], 8 * plain.interval[1],
    ))  # fmt: skip
    _close(scaled.p_two_sided, plain.p_two_sided)


def test_the_order_of_seeds_does_not_matter():
    first, second = _arms(5)
    assert paired_differences(first, second) == paired_differences(first, dict(reversed(second.items())))


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_covers_the_truth_as_often_as_it_says(level):
    repetitions, truth = 3000, 0.3
    samples = numpy.random.default_rng(0).normal(truth, 2.0, (repetitions, 4)).tolist()
    covered = 0
    for sample in samples:
        low, high = estimate(sample, level=level).interval
        covered += low < truth < high
    tolerance = 4 * math.sqrt(level * (1 - level) / repetitions)  # four standard errors of the simulation
    assert abs(covered / repetitions - level) < tolerance


def test_pairing_removes_the_common_effect_of_seeds():
    first, second = _arms(50)
    assert paired_differences(first, second).sd < 0.1 < estimate(first.values()).sd


def test_one_seed_has_no_finite_interval():
    result = paired_differences({0: 1.0}, {0: 2.0})
    assert (result.n, result.mean) == (1, -1.0) and math.isnan(result.sd)
    assert result.interval == (-math.inf, math.inf)
    assert result.p_two_sided == result.p_lower() == result.p_higher() == 1.0


def test_arms_that_are_equal_bit_for_bit_have_a_point_interval():
    arm = {0: 5.1, 1: 5.3, 2: 5.2}
    result = paired_differences(arm, dict(arm))
    assert (result.mean, result.sd, result.interval, result.p_two_sided) == (0.0, 0.0, (0.0, 0.0), 1.0)
    assert result.p_lower(0.1) == result.p_higher(-0.1) == 0.0


def test_a_large_difference_keeps_its_p():
    assert 0 < Estimate(n=9, mean=50.0, sd=1.0).p_two_sided < 1e-12


def test_an_estimate_is_printed_with_its_level_and_number():
    assert str(Estimate(n=3, mean=2.0, sd=1.0, level=0.9)) == "2 [0.314, 3.69], 90 % of 3"


def test_seeds_of_one_arm_only_are_named():
    with pytest.raises(ValueError, match=r"the arm lacks \[5\], the baseline lacks \[1, 2\]\. Run the missing seeds"):
        paired_differences({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.5}, {3: 0.0, 4: 0.0, 5: 0.0})
    result = paired_differences({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.5}, {3: 0.0, 4: 0.0, 5: 0.0}, intersect=True)
    assert (result.n, result.mean) == (2, 1.25)
    with pytest.raises(ValueError, match=r"a seed in common: the arm has \[1\]; the baseline has \[2\]"):
        paired_differences({1: 1.0}, {2: 1.0}, intersect=True)


def test_a_value_that_is_nan_in_a_seed_left_out_does_not_matter():
    assert paired_differences({0: 1.0, 1: 2.0, 2: math.nan}, {0: 0.0, 1: 0.0}, intersect=True).mean == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_value_that_is_not_finite_raises(value):
    with pytest.raises(ValueError, match=r"must be a finite number: got .* at seed 1 of the arm\. A run that diverged"):
        paired_differences({0: 1.0, 1: value}, {0: 1.0, 1: 1.0})
    with pytest.raises(ValueError, match="at seed 1 of the baseline"):
        paired_differences({0: 1.0, 1: 1.0}, {0: 1.0, 1: value})
    with pytest.raises(ValueError, match="at index 1"):
        estimate([1.0, value])
    with pytest.raises(ValueError, match="at seed 7 of factor 2"):
        trend({1: {7: 1.0}, 2: {7: value}})


def test_empty_input_raises():
    with pytest.raises(ValueError, match="at least one value: got none"):
        estimate([])
    with pytest.raises(ValueError, match="at least one seed: the baseline has none"):
        paired_differences({0: 1.0}, {})


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, math.nan])
def test_a_level_outside_0_and_1_raises(level):
    for make in (
        lambda: estimate([1.0, 2.0], level=level),
        lambda: paired_differences({0: 1.0}, {0: 1.0}, level=level),
        lambda: trend({1: {0: 1.0}, 2: {0: 1.0}}, level=level),
    ):
        with pytest.raises(ValueError, match=r"level must lie between 0 and 1, both excluded: got level=.*Give 0\.95"):
            make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "mean": 0.0, "sd": 1.0}, "n must be a whole number"),
        ({"n": 2.5, "mean": 0.0, "sd": 1.0}, "n must be a whole number"),
        ({"n": 3, "mean": math.nan, "sd": 1.0}, "mean must be a finite number"),
        ({"n": 3, "mean": 0.0, "sd": -1.0}, "sd must be a finite number, at least 0"),
        ({"n": 3, "mean": 0.0, "sd": math.nan}, "run a second"),
    ],
)
def test_an_invalid_estimate_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        Estimate(**arguments)


# ---------------------------------------------------------------------------------------------------------
# trends


def test_slope_by_hand():
    """x = 0, 1, 2, 3 is -1.5 ... 1.5 about its mean, 5 in squares; y = 4, 4, 2, 0: (-6 - 2 + 1 + 0 ...) by the sum."""
    arms = {1: {0: 4.0, 1: 3.0}, 2: {0: 4.0, 1: 2.0}, 4: {0: 2.0, 1: 1.0}, 8: {0: 0.0, 1: 0.0}}
    result = trend(arms)
    slopes = (-1.5 * 4 - 0.5 * 4 + 0.5 * 2 + 1.5 * 0) / 5, -1.0  # -1.4 and -1
    _close((result.mean, result.sd), (-1.2, 0.4 / math.sqrt(2)))
    assert result == estimate(slopes)


def test_slopes_equal_the_reference():
    """The normal equations of the line, solved by hand; factors in any order and not powers of 2."""
    generator = numpy.random.default_rng(1)
    arms = {factor: dict(enumerate(generator.normal(factor, 1.0, 5).tolist())) for factor in (6, 1, 0.5, 3)}
    slopes = []
    for seed in range(5):
        x = [math.log(factor) / math.log(2) for factor in arms]
        y = [arm[seed] for arm in arms.values()]
        top = len(x) * sum(a * b for a, b in zip(x, y, strict=True)) - sum(x) * sum(y)
        slopes.append(top / (len(x) * sum(a * a for a in x) - sum(x) ** 2))
    expected = estimate(slopes, level=0.9)
    result = trend(arms, level=0.9)
    _close((result.n, result.mean, result.sd, result.level), (5, expected.mean, expected.sd, 0.9))


def test_invariants_of_a_trend():
    generator = numpy.random.default_rng(2)
    arms = {factor: dict(enumerate(generator.normal(0, 1.0, 4).tolist())) for factor in (1, 2, 4, 8)}
    plain = trend(arms)

    def same(changed, sign=1.0):
        result = trend(changed)
        _close((result.mean, result.sd), (sign * plain.mean, plain.sd))

    same({factor: {seed: value + 10 * seed for seed, value in arm.items()} for factor, arm in arms.items()})
    same({16 * factor: arm for factor, arm in arms.items()})  # the unit of the factor
    same({1 / factor: arm for factor, arm in arms.items()}, sign=-1)
    same(dict(reversed(arms.items())))
    two = trend({1: arms[1], 2: arms[2]})
    assert two.mean == pytest.approx(paired_differences(arms[2], arms[1]).mean)
    assert two.sd == pytest.approx(paired_differences(arms[2], arms[1]).sd)


def test_the_slope_is_found_despite_the_common_effect_of_seeds():
    generator = numpy.random.default_rng(3)
    common = generator.normal(0, 5.0, 30)
    arms = {
        factor: dict(enumerate((common - 0.1 * math.log2(factor) + generator.normal(0, 0.1, 30)).tolist()))
        for factor in (1, 2, 4, 8)
    }
    low, high = trend(arms, level=0.999).interval
    assert low < -0.1 < high < 0


def test_a_trend_needs_factors_and_the_same_seeds():
    with pytest.raises(ValueError, match=r"at least two factors: got \[1\]"):
        trend({1: {0: 1.0}})
    with pytest.raises(ValueError, match="finite and above 0: got 0"):
        trend({0: {0: 1.0}, 1: {0: 1.0}})
    with pytest.raises(ValueError, match=r"factor 2 lacks \[1\]\. Run the missing seeds"):
        trend({1: {0: 1.0, 1: 1.0}, 2: {0: 1.0}})
    assert trend({1: {0: 1.0, 1: 1.0}, 2: {0: 2.0}}, intersect=True).n == 1
    with pytest.raises(ValueError, match="factor 2 has none"):
        trend({1: {0: 1.0}, 2: {}})
