"""Verdicts: whether an estimate supports a claim, alone or in a family of claims."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from equipoise_lab.analysis.statistics import Estimate

__all__ = ["Hypothesis", "Judgement", "holm", "judge", "judge_family"]

Verdict = Literal["supported", "not supported", "undecided"]


@dataclass(frozen=True)
class Hypothesis:
    """A claim about a true mean: ``"lower"`` or ``"higher"`` than 0, or ``"equal"`` to 0 within ``±margin``.

    >>> Hypothesis("equal", margin=0.02)
    Hypothesis(direction='equal', margin=0.02)
    """

    direction: Literal["lower", "higher", "equal"]
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("lower", "higher", "equal"):
            raise ValueError(f"direction must be 'lower', 'higher' or 'equal': got {self.direction!r}.")
        if self.direction != "equal":
            if self.margin is not None:
                raise ValueError(
                    f"Only a claim of equality has a margin: got margin={self.margin!r} with {self.direction!r}. "
                    "Leave it out."
                )
        elif self.margin is None or not 0 < self.margin < math.inf:
            raise ValueError(
                f"A claim of equality must have a finite margin above 0: got margin={self.margin!r}. Give the largest "
                "difference, in the unit of the value, that still counts as equal."
            )


@dataclass(frozen=True)
class Judgement:
    """A verdict, its estimate and its p values.

    ``p`` is two-sided: the verdict is decided if ``p < 1 - estimate.level``. ``p_adjusted`` is ``p`` adjusted for the
    family of claims. ``p_one_sided`` is the p of the claim itself, in the claimed direction.
    """

    hypothesis: Hypothesis
    estimate: Estimate
    verdict: Verdict
    p: float
    p_adjusted: float
    p_one_sided: float


def judge(estimate: Estimate, hypothesis: Hypothesis) -> Judgement:
    """*Supported* if the interval lies wholly inside the claim, *not supported* if wholly outside, else *undecided*.

    | claim  | supported                        | not supported                  | p                                  |
    |--------|----------------------------------|--------------------------------|------------------------------------|
    | lower  | ``high < 0``                     | ``low > 0``                    | ``2 min(p_lower(0), p_higher(0))`` |
    | higher | ``low > 0``                      | ``high < 0``                   | the same                           |
    | equal  | ``-margin < low, high < margin`` | ``low > margin`` or            | ``2 min(tost, apart)``             |
    |        |                                  | ``high < -margin``             |                                    |

    with ``tost = max(p_lower(margin), p_higher(-margin))``, ``apart = min(p_higher(margin), p_lower(-margin))``.

    Level: *supported* is a one-sided test at ``(1 - level) / 2``, 2.5 % by default. For equality it is two one-sided
    tests (TOST) at 2.5 % each. The usual TOST at 5 % only needs the 90 % interval to lie inside; for that test, make
    the estimate with ``level=0.9``. *Not supported* is wrong with probability at most ``(1 - level) / 2`` for a
    difference, ``1 - level`` for equality. Source: Schuirmann 1987, DOI 10.1007/BF01068419.

    One seed is always undecided.

    >>> judge(Estimate(n=9, mean=-0.3, sd=0.3), Hypothesis("lower")).verdict
    'supported'
    >>> judge(Estimate(n=9, mean=-0.3, sd=0.3), Hypothesis("equal", margin=0.2)).verdict
    'undecided'
    """
    low, high = estimate.interval
    if hypothesis.direction == "equal":
        margin = hypothesis.margin
        assert margin is not None
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
        p_claim = max(estimate.p_lower(margin), estimate.p_higher(-margin))
        p = min(1.0, 2 * min(p_claim, estimate.p_higher(margin), estimate.p_lower(-margin)))
    else:
        inside, outside = high < 0, low > 0
        p_claim, p = estimate.p_lower(), estimate.p_two_sided
        if hypothesis.direction == "higher":
            inside, outside, p_claim = outside, inside, estimate.p_higher()
    verdict: Verdict = "supported" if inside else "not supported" if outside else "undecided"
    return Judgement(hypothesis, estimate, verdict, p, p, p_claim)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p: ``max over j <= i of min(1, (m - j + 1) p_(j))`` for the i-th smallest of m.

    If every claim with an adjusted p below alpha is called decided, the probability of any error in the family is at
    most alpha, however the tests depend on each other. Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.

    >>> holm({"a": 0.5, "b": 0.125, "c": 0.25})
    {'a': 0.5, 'b': 0.375, 'c': 0.5}
    """
    if not p_values:
        raise ValueError("A family must have at least one p value: got none. Pass the primary p of every claim.")
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(
                f"A p value must lie between 0 and 1: got {p!r} for {name!r}. Pass 1 for a claim without data."
            )
    adjusted, largest = dict(p_values), 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        adjusted[name] = largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
    return adjusted


def judge_family(judgements: Mapping[str, Judgement], looks: Mapping[str, int] | None = None) -> dict[str, Judgement]:
    """The primary judgements of a family of claims with Holm's p. Verdicts that do not survive become *undecided*.

    A verdict survives if ``p_adjusted < 1 - level``. If all true means lie exactly on the boundary (0, or ``±margin``),
    the chance that even one claim gets a verdict is at most ``1 - level``. If they lie elsewhere, a verdict may take
    the wrong side. That this, too, stays below ``1 - level`` is proven only for independent claims, under conditions
    (Shaffer 1980, Annals of Statistics 8, 1342-1347). For claims that share runs, make the estimates with
    ``level = 1 - (1 - level) / m`` (Bonferroni).

    ``looks``: how often a claim is judged, if more than once: after 8 seeds, say, and again after 16 if it is undecided
    then. Its p is multiplied by this number. So the bound holds whenever one stops, if the looks are fixed beforehand:
    the probability that p falls below alpha / K at any of K looks is at most alpha (Bonferroni).

    Claims that could not be run belong to the family: judge an estimate of one seed, which has p = 1. All judgements
    must have the same level. Names keep their order. To judge a family twice changes nothing.

    >>> one = judge(Estimate(n=5, mean=-1.0, sd=0.7), Hypothesis("lower"))  # p = 0.033
    >>> family = judge_family({"one": one, "two": one})
    >>> one.verdict, family["one"].verdict, round(family["one"].p_adjusted, 3)
    ('supported', 'undecided', 0.066)
    """
    levels = {judgement.estimate.level for judgement in judgements.values()}
    if len(levels) > 1:
        raise ValueError(f"A family must have one level: got {sorted(levels)}. Make all estimates with the same level.")
    alone = {name: judge(judgement.estimate, judgement.hypothesis) for name, judgement in judgements.items()}
    looks = looks or {}
    adjusted = holm({name: min(1.0, looks.get(name, 1) * judgement.p) for name, judgement in alone.items()})
    return {
        name: replace(
            judgement,
            p_adjusted=adjusted[name],
            verdict=judgement.verdict if adjusted[name] < 1 - judgement.estimate.level else "undecided",
        )
        for name, judgement in alone.items()
    }
