"""values by seed -> the mean difference, or the mean slope, with its t interval and its p values.

Arms are paired by seed: the same seed means the same weights and the same micro-batches, so what seeds have in common
drops out of the difference. All is the one-sample t method on one number a seed. It assumes that these numbers are
independent and about normal; their mean and spread are all that it looks at.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from scipy import stats

__all__ = ["Estimate", "estimate", "paired_differences", "trend"]

Arm = Mapping[Any, float]  # seed -> value


@cache
def t_quantile(n: int, level: float) -> float:
    """``t(n - 1)`` at ``(1 + level) / 2``: what a two-sided interval of that level has of standard errors."""
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
    """The mean of n independent numbers, and how well they determine it.

    - ``sd``: standard deviation with n - 1; nan where n is 1.
    - ``standard_error``: ``sd / sqrt(n)``.
    - ``interval``: ``mean ± t(n - 1, (1 + level) / 2) * standard_error``, in the unit of the values. It covers the true
      mean in a share ``level`` of repetitions. With one number it is the whole line.

    Source: Student 1908; every textbook. Where all numbers are the same, sd is 0 and the interval is a point: true of
    arms that are equal bit for bit, and otherwise a sign that something was not varied.

    >>> some = Estimate(n=3, mean=2.0, sd=1.0)
    >>> [round(end, 3) for end in some.interval], round(some.p_two_sided, 4)
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
        reach = t_quantile(self.n, self.level) * self.standard_error
        return self.mean - reach, self.mean + reach

    def p_lower(self, bound: float = 0.0) -> float:
        """One-sided p for a true mean below ``bound``: ``P(T(n - 1) <= (mean - bound) / standard_error)``.

        The probability of a mean so far below, were the true one at ``bound``. 1 with a single number. With an sd of 0:
        0 below the bound, otherwise 1.
        """
        return self._p(bound - self.mean)

    def p_higher(self, bound: float = 0.0) -> float:
        """The same for a true mean above ``bound``."""
        return self._p(self.mean - bound)

    @cached_property
    def p_two_sided(self) -> float:
        """p for a true mean that is not 0: twice the smaller one-sided p. Below ``1 - level`` where ``interval`` leaves
        0 out."""
        return min(1.0, 2 * min(self.p_lower(), self.p_higher()))

    def _p(self, beyond: float) -> float:
        if self.n < 2:
            return 1.0
        if self.standard_error == 0:
            return 0.0 if beyond > 0 else 1.0
        return float(stats.t.sf(beyond / self.standard_error, self.n - 1))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.3g} [{low:.3g}, {high:.3g}], {100 * self.level:.4g} % of {self.n}"


def estimate(values: Iterable[float], *, level: float = 0.95) -> Estimate:
    """The ``Estimate`` of numbers of which there is one a seed.

    Raises ``ValueError`` without any number, and for one that is not finite.

    >>> estimate([1, 2, 3])
    Estimate(n=3, mean=2.0, sd=1.0, level=0.95)
    """
    values = [_finite(value, f"at place {place}") for place, value in enumerate(values)]
    if not values:
        raise ValueError("An estimate needs at least one value: got none. Run a seed.")
    n = len(values)
    mean = math.fsum(values) / n
    sd = math.hypot(*(value - mean for value in values)) / math.sqrt(n - 1) if n > 1 else math.nan
    return Estimate(n, mean, sd, level)


def paired_differences(arm: Arm, baseline: Arm, *, level: float = 0.95, intersect: bool = False) -> Estimate:
    """The mean over seeds of ``arm[seed] - baseline[seed]``, as an ``Estimate``; below 0 where ``arm`` is the lower.

    Both map seeds to values. Raises ``ValueError`` for an empty arm, for a value that is not finite (None included, as
    a run folder has it), and for seeds that only one arm has, unless ``intersect`` asks for those that both have.
    Leaving seeds out because of how they came out makes the interval wrong; do it for runs that were never made.

    >>> paired_differences({0: 2.0, 1: 3.0}, {0: 1.0, 1: 1.0})
    Estimate(n=2, mean=1.5, sd=0.7071067811865476, level=0.95)
    """
    return estimate((first - second for first, second in paired(arm, baseline, intersect)), level=level)


def paired(arm: Arm, baseline: Arm, intersect: bool) -> list[tuple[float, float]]:
    seeds = _common({"the arm": arm, "the baseline": baseline}, intersect)
    return [
        (
            _finite(arm[seed], f"at seed {seed!r} of the arm"),
            _finite(baseline[seed], f"at seed {seed!r} of the baseline"),
        )
        for seed in seeds
    ]


def trend(arms: Mapping[int, Arm] | Mapping[float, Arm], *, level: float = 0.95, intersect: bool = False) -> Estimate:
    """How a value moves with a factor (1, 2, 4, 8 ranks, say): the mean slope a doubling, as an ``Estimate``.

    ``arms`` maps each factor to values by seed. For each seed the slope of least squares on ``x = log2(factor)``,

        slope = sum_i (x_i - mean x) (y_i - mean y) / sum_i (x_i - mean x)^2

    in the value's unit per doubling; then the t interval of the slopes. Below 0: the value falls as the factor grows.
    A slope says where the line goes, not that every step goes the same way.

    Raises ``ValueError`` for fewer than two factors or one that is not above 0, and as ``paired_differences`` does.

    >>> trend({1: {0: 3.0, 1: 5.0}, 2: {0: 2.0, 1: 4.0}, 4: {0: 1.0, 1: 3.0}})
    Estimate(n=2, mean=-1.0, sd=0.0, level=0.95)
    """
    if len(arms) < 2:
        raise ValueError(f"A trend needs at least two factors: got {list(arms)}. Run the claim at another factor too.")
    for factor in arms:
        if not 0 < factor < math.inf:
            raise ValueError(f"A factor must be finite and above 0: got {factor!r}. Its logarithm is what is fitted.")
    x = [math.log2(factor) for factor in arms]
    centre = math.fsum(x) / len(x)
    x = [value - centre for value in x]
    spread = math.fsum(value**2 for value in x)
    seeds = _common({f"factor {factor}": arm for factor, arm in arms.items()}, intersect)

    def slope(seed: Any) -> float:
        y = [_finite(arm[seed], f"at seed {seed!r} of factor {factor}") for factor, arm in arms.items()]
        middle = math.fsum(y) / len(y)
        return math.fsum(a * (b - middle) for a, b in zip(x, y, strict=True)) / spread

    return estimate(map(slope, seeds), level=level)


def _common(arms: Mapping[str, Arm], intersect: bool) -> list[Any]:
    """The seeds that every arm has, in the order of the first arm."""
    for name, arm in arms.items():
        if not arm:
            raise ValueError(f"Every arm must hold at least one seed: {name} holds none. Run a seed.")
    every = list(dict.fromkeys(seed for arm in arms.values() for seed in arm))
    lacking = {name: [seed for seed in every if seed not in arm] for name, arm in arms.items()}
    if any(lacking.values()) and not intersect:
        said = ", ".join(f"{name} lacks {seeds}" for name, seeds in lacking.items() if seeds)
        raise ValueError(
            f"Every arm must hold the same seeds: {said}. Run what is lacking, or pass intersect=True for the seeds "
            "that every arm has."
        )
    shared = [seed for seed in every if all(seed in arm for arm in arms.values())]
    if not shared:
        held = "; ".join(f"{name} holds {list(arm)}" for name, arm in arms.items())
        raise ValueError(f"The arms must have a seed in common: {held}. Run the same seeds in each.")
    return shared


def _finite(value: float, where: str) -> float:
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"A value must be a finite number: got {value!r} {where}. A run that diverged has no value: report it, and "
            "decide the claim without that seed in any arm."
        )
    return float(value)
