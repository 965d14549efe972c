"""The mean difference or the mean slope over seeds, with its t interval and p values.

Arms are paired by seed. The same seed means the same initial weights and the same micro-batches, so the effect of the
seed cancels in the difference. The method is always the one-sample t test, on one number per seed. It assumes that
these numbers are independent and approximately normal.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from scipy import stats

__all__ = ["Estimate", "estimate", "paired_differences", "trend"]

ValuesBySeed = Mapping[Any, float]


@cache
def t_quantile(n: int, level: float) -> float:
    """``t(n - 1)`` at ``(1 + level) / 2``: half the width of a two-sided interval, in standard errors."""
    return float(stats.t.isf((1 - level) / 2, n - 1))


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, both excluded: got level={level!r}. Give 0.95 for 95 %.")


def check_spread(sd: float) -> None:
    if not 0 <= sd < math.inf:
        raise ValueError(
            f"sd must be a finite number, at least 0: got sd={sd!r}. One seed has no standard deviation; run a second."
        )


@dataclass(frozen=True)
class Estimate:
    """The mean of n independent numbers and its precision.

    - ``sd``: standard deviation with n - 1; nan if n is 1.
    - ``standard_error``: ``sd / sqrt(n)``.
    - ``interval``: ``mean ± t(n - 1, (1 + level) / 2) * standard_error``, in the unit of the values. It covers the true
      mean in a share ``level`` of repetitions. With one number it is the whole real line.

    If all numbers are equal, sd is 0 and the interval is a point. This is right for arms that are equal bit for bit;
    otherwise it suggests that something was not varied. Source: Student 1908.

    >>> mean = Estimate(n=3, mean=2.0, sd=1.0)
    >>> [round(end, 3) for end in mean.interval], round(mean.p_two_sided, 4)
    ([-0.484, 4.484], 0.0742)
    """

    n: int
    mean: float
    sd: float
    level: float = 0.95

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.n < 1 or self.n != int(self.n):
            raise ValueError(f"n must be a whole number, at least 1: got n={self.n!r}. Give the number of seeds.")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be a finite number: got mean={self.mean!r}. Leave out runs that diverged.")
        if self.n > 1:
            check_spread(self.sd)

    @cached_property
    def standard_error(self) -> float:
        return self.sd / math.sqrt(self.n)

    @cached_property
    def interval(self) -> tuple[float, float]:
        if self.n < 2:
            return -math.inf, math.inf
        half_width = t_quantile(self.n, self.level) * self.standard_error
        return self.mean - half_width, self.mean + half_width

    def p_lower(self, bound: float = 0.0) -> float:
        """One-sided p for the claim that the true mean is below ``bound``.

        ``P(T(n - 1) <= (mean - bound) / standard_error)``: the probability of a mean this low if the true mean were
        ``bound``. 1 with a single number. If sd is 0: 0 if the mean is below the bound, otherwise 1.
        """
        return self._p(bound - self.mean)

    def p_higher(self, bound: float = 0.0) -> float:
        """One-sided p for the claim that the true mean is above ``bound``; see ``p_lower``."""
        return self._p(self.mean - bound)

    @cached_property
    def p_two_sided(self) -> float:
        """p for the claim that the true mean is not 0: twice the smaller one-sided p. It is below ``1 - level`` exactly
        if ``interval`` excludes 0."""
        return min(1.0, 2 * min(self.p_lower(), self.p_higher()))

    def _p(self, distance: float) -> float:
        """``distance``: from the bound to the mean, positive on the claimed side."""
        if self.n < 2:
            return 1.0
        if self.standard_error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / self.standard_error, self.n - 1))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.3g} [{low:.3g}, {high:.3g}], {100 * self.level:.4g} % of {self.n}"


def estimate(values: Iterable[float], *, level: float = 0.95) -> Estimate:
    """The ``Estimate`` of one number per seed. Raises ``ValueError`` if there is none, or if one is not finite.

    >>> estimate([1, 2, 3])
    Estimate(n=3, mean=2.0, sd=1.0, level=0.95)
    """
    values = [_finite(value, f"at index {index}") for index, value in enumerate(values)]
    if not values:
        raise ValueError("An estimate needs at least one value: got none. Run a seed.")
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.hypot(*(value - mean for value in values)) / math.sqrt(n - 1) if n > 1 else math.nan
    return Estimate(n, mean, sd, level)


def paired_differences(
    arm: ValuesBySeed, baseline: ValuesBySeed, *, level: float = 0.95, intersect: bool = False
) -> Estimate:
    """The mean over seeds of ``arm[seed] - baseline[seed]``, as an ``Estimate``. Below 0 if ``arm`` is lower.

    Both arms map seeds to values. ``intersect`` uses only the seeds that both arms have. Use it for runs that were
    never made: to drop seeds because of their results makes the interval wrong.

    Raises ``ValueError`` for an empty arm, for a value that is not finite (or None, as a run folder stores it), and,
    without ``intersect``, for seeds that only one arm has.

    >>> paired_differences({0: 2.0, 1: 3.0}, {0: 1.0, 1: 1.0})
    Estimate(n=2, mean=1.5, sd=0.7071067811865476, level=0.95)
    """
    return estimate((a - b for a, b in paired(arm, baseline, intersect)), level=level)


def paired(arm: ValuesBySeed, baseline: ValuesBySeed, intersect: bool) -> list[tuple[float, float]]:
    """The values of both arms, by seed."""
    seeds = _common_seeds({"the arm": arm, "the baseline": baseline}, intersect)
    return [
        (
            _finite(arm[seed], f"at seed {seed!r} of the arm"),
            _finite(baseline[seed], f"at seed {seed!r} of the baseline"),
        )
        for seed in seeds
    ]


def trend(
    arms: Mapping[int, ValuesBySeed] | Mapping[float, ValuesBySeed], *, level: float = 0.95, intersect: bool = False
) -> Estimate:
    """How a value changes per doubling of a factor (1, 2, 4, 8 ranks, say): the mean slope, as an ``Estimate``.

    ``arms`` maps each factor to values by seed. Each seed gives the least-squares slope on ``x = log2(factor)``,

        slope = sum_i (x_i - mean x) (y_i - mean y) / sum_i (x_i - mean x)^2

    in the value's unit per doubling. The interval is that of the mean slope. Below 0, the value falls as the factor
    grows. A slope describes the whole range: single steps may go the other way.

    Raises ``ValueError`` for fewer than two factors, for a factor that is not above 0, and as ``paired_differences``.

    >>> trend({1: {0: 3.0, 1: 5.0}, 2: {0: 2.0, 1: 4.0}, 4: {0: 1.0, 1: 3.0}})
    Estimate(n=2, mean=-1.0, sd=0.0, level=0.95)
    """
    if len(arms) < 2:
        raise ValueError(f"A trend needs at least two factors: got {list(arms)}. Run another factor too.")
    for factor in arms:
        if not 0 < factor < math.inf:
            raise ValueError(
                f"A factor must be finite and above 0: got {factor!r}. The slope is fitted to its logarithm."
            )
    x = [math.log2(factor) for factor in arms]
    mean_x = math.fsum(x) / len(x)
    x = [value - mean_x for value in x]
    sum_of_squares = math.fsum(value**2 for value in x)
    seeds = _common_seeds({f"factor {factor}": arm for factor, arm in arms.items()}, intersect)

    def slope(seed: Any) -> float:
        y = [_finite(arm[seed], f"at seed {seed!r} of factor {factor}") for factor, arm in arms.items()]
        mean_y = math.fsum(y) / len(y)
        return math.fsum(a * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum_of_squares

    return estimate(map(slope, seeds), level=level)


def _common_seeds(arms: Mapping[str, ValuesBySeed], intersect: bool) -> list[Any]:
    """The seeds that every arm has, in the order of the first arm."""
    for name, arm in arms.items():
        if not arm:
            raise ValueError(f"Every arm must have at least one seed: {name} has none. Run a seed.")
    all_seeds = list(dict.fromkeys(seed for arm in arms.values() for seed in arm))
    missing = {name: [seed for seed in all_seeds if seed not in arm] for name, arm in arms.items()}
    if any(missing.values()) and not intersect:
        gaps = ", ".join(f"{name} lacks {seeds}" for name, seeds in missing.items() if seeds)
        raise ValueError(
            f"All arms must have the same seeds: {gaps}. Run the missing seeds, or pass intersect=True to use only "
            "those that every arm has."
        )
    common = [seed for seed in all_seeds if all(seed in arm for arm in arms.values())]
    if not common:
        seeds_by_arm = "; ".join(f"{name} has {list(arm)}" for name, arm in arms.items())
        raise ValueError(f"The arms must have a seed in common: {seeds_by_arm}. Run the same seeds in each.")
    return common


def _finite(value: float, where: str) -> float:
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"A value must be a finite number: got {value!r} {where}. A run that diverged has no value: report it, and "
            "leave that seed out of every arm."
        )
    return float(value)
