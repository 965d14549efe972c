"""Power: what a number of seeds can decide, and how many seeds a claim needs. Exact for normal differences."""

import math
from dataclasses import dataclass

from scipy import integrate, optimize, special, stats

from equipoise_lab.analysis.statistics import ValuesBySeed, check_level, check_spread, estimate, paired, t_quantile
from equipoise_lab.analysis.verdicts import Hypothesis

__all__ = ["MAX_SEEDS", "Noise", "detectable_effect", "noise", "power", "seeds_needed"]

MAX_SEEDS = 10_000


def power(hypothesis: Hypothesis, mean: float, sd: float, n: int, *, level: float = 0.95) -> float:
    """The probability that n seeds support the hypothesis, if their differences are normal with this mean and sd.

        lower, higher    P(T > t),  T noncentral t with n - 1 degrees and noncentrality ∓sqrt(n) mean / sd
        equal            P(|sqrt(n) mean / sd + Z| < sqrt(n) margin / sd - t U)
        t = quantile of t(n - 1) at (1 + level) / 2;  Z normal, (n - 1) U^2 chi-squared with n - 1 degrees

    Range 0 to 1; 0 with one seed. Equality is integrated over U, because the often used difference of two noncentral
    t probabilities is not exact. Source: Owen 1965, Biometrika 52, 437-446; Phillips 1990, DOI 10.1007/BF01063556.

    >>> round(power(Hypothesis("lower"), mean=-0.05, sd=0.1, n=34), 3)
    0.808
    """
    _check_plan(mean, sd, n, level)
    return _power(hypothesis, mean, sd, n, level)


def _power(hypothesis: Hypothesis, mean: float, sd: float, n: int, level: float) -> float:
    if n == 1:
        return 0.0
    effect = -mean if hypothesis.direction == "lower" else mean
    if sd == 0:
        margin = hypothesis.margin
        return float(effect > 0 if margin is None else abs(effect) < margin)
    if hypothesis.margin is None:
        return _power_of_difference(math.sqrt(n) * effect / sd, n, level)
    return _power_of_equality(math.sqrt(n) * effect / sd, math.sqrt(n) * hypothesis.margin / sd, n, level)


def _power_of_difference(noncentrality: float, n: int, level: float) -> float:
    noncentrality = max(-1e8, min(noncentrality, 1e8))  # scipy returns nan far beyond
    return float(stats.nct.sf(t_quantile(n, level), n - 1, noncentrality))


def _power_of_equality(centre: float, margin: float, n: int, level: float) -> float:
    t, scale = t_quantile(n, level), math.sqrt(n - 1)

    def integrand(u: float) -> float:  # u = sample sd / sd; the sample mean must lie inside the margins less t u
        inside = special.ndtr(margin - t * u - centre) - special.ndtr(t * u - margin - centre)
        return inside * scale * stats.chi.pdf(scale * u, n - 1)

    start, end = (float(stats.chi.ppf(q, n - 1)) / scale for q in (1e-15, 1 - 1e-15))
    end = min(end, margin / t)
    probability = integrate.quad(integrand, start, end, limit=200)[0] if start < end else 0.0
    return min(1.0, float(probability))


def seeds_needed(
    hypothesis: Hypothesis,
    mean: float,
    sd: float,
    *,
    power: float = 0.8,
    level: float = 0.95,
    limit: int = MAX_SEEDS,
) -> int | None:
    """The smallest total number of seeds that supports the hypothesis with at least this power.

    ``mean`` and ``sd`` of the differences are taken as the true values, observed or assumed. Returns None if the mean
    contradicts the claim (for equality: if it is outside the margins), because no number of seeds then supports it. For
    the number that makes the claim *not supported*, pass the opposite claim (equality: ``"higher"`` with
    ``abs(mean) - margin``). The result never exceeds ``limit``; ``limit`` itself means "that many or more".

    The result is only a plan: the sd of three seeds may be wrong by a factor of 0.5 to 6 (95 %). In a family of m
    claims, pass ``level = 1 - (1 - level) / m``, the first step of Holm.

    >>> seeds_needed(Hypothesis("lower"), mean=-0.05, sd=0.1), seeds_needed(Hypothesis("lower"), mean=0.05, sd=0.1)
    (34, None)
    """
    _check_power(power)
    if limit < 2 or limit != int(limit):
        raise ValueError(f"limit must be a whole number, at least 2: got limit={limit!r}. One seed decides nothing.")

    _check_plan(mean, sd, limit, level)
    if not _is_on_claimed_side(hypothesis, mean):
        return None

    def is_enough(n: int) -> bool:
        return _power(hypothesis, mean, sd, n, level) >= power

    # Power grows with n. For equality it may fall at first, because a few seeds can show too little noise by chance.
    # Even then it crosses the wanted power only once after n = 2. So double n until it is enough, then bisect.
    too_few, n = 1, 2
    while not (n_is_enough := is_enough(n)) and n < limit:
        too_few, n = n, min(2 * n, limit)
    if not n_is_enough:
        return limit
    while n - too_few > 1:
        middle = (too_few + n) // 2
        too_few, n = (too_few, middle) if is_enough(middle) else (middle, n)
    return n


def _is_on_claimed_side(hypothesis: Hypothesis, mean: float) -> bool:
    if hypothesis.margin is not None:
        return abs(mean) < hypothesis.margin
    return mean < 0 if hypothesis.direction == "lower" else mean > 0


def detectable_effect(sd: float, n: int, *, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference that n seeds detect with this power, in the unit of ``sd``. inf with one seed.

    It solves ``power(Hypothesis("higher"), effect, sd, n) = power``.

    >>> round(detectable_effect(0.1, n=3), 3), round(detectable_effect(0.1, n=34), 3)
    (0.326, 0.05)
    """
    _check_plan(0.0, sd, n, level)
    _check_power(power)
    if n == 1:
        return math.inf
    low, high = 0.0, 1.0  # noncentrality
    while _power_of_difference(high, n, level) < power:
        low, high = high, 2 * high
    if _power_of_difference(low, n, level) >= power:
        return 0.0  # chance alone reaches this power
    root = optimize.brentq(lambda nc: _power_of_difference(nc, n, level) - power, low, high, xtol=1e-10)
    return root * sd / math.sqrt(n)


def _check_plan(mean: float, sd: float, n: int, level: float) -> None:
    check_level(level)
    check_spread(sd)
    if not math.isfinite(mean):
        raise ValueError(f"mean must be a finite number: got mean={mean!r}. Give the true mean to plan for.")
    if n < 1 or n != int(n):
        raise ValueError(f"n must be a whole number, at least 1: got n={n!r}. Give the number of seeds.")


def _check_power(power: float) -> None:
    if not 0 < power < 1:
        raise ValueError(f"power must lie between 0 and 1, both excluded: got power={power!r}. Give 0.8 for 80 %.")


@dataclass(frozen=True)
class Noise:
    """Standard deviations over seeds of two arms and of their paired differences; nan with one seed. See ``noise``.

    ``detectable`` is the smallest true difference that n seeds detect with power ``power``.
    """

    n: int
    sd_arm: float
    sd_baseline: float
    sd_difference: float
    detectable: float
    power: float
    level: float


def noise(
    arm: ValuesBySeed, baseline: ValuesBySeed, *, power: float = 0.8, level: float = 0.95, intersect: bool = False
) -> Noise:
    """How much seeds alone vary two arms, and the difference that n seeds can detect. All in the unit of the values.

    Pairing helps if ``sd_difference`` is below ``sqrt(sd_arm^2 + sd_baseline^2)``. Raises as ``paired_differences``.

    >>> observed = noise({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.5, 2: 3.5})
    >>> observed.sd_arm, round(observed.sd_difference, 3), round(observed.detectable, 2)
    (1.0, 0.289, 0.94)
    """
    _check_power(power)
    pairs = paired(arm, baseline, intersect)
    arm_values, baseline_values = zip(*pairs, strict=True)
    sd_difference = estimate((a - b for a, b in pairs), level=level).sd
    n = len(pairs)
    detectable = math.inf if n < 2 else detectable_effect(sd_difference, n, power=power, level=level)
    return Noise(n, estimate(arm_values).sd, estimate(baseline_values).sd, sd_difference, detectable, power, level)
