"""Stored results of runs -> a verdict on each claim. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis import (
    Estimate,
    Hypothesis,
    Judgement,
    estimate,
    judge,
    judge_family,
    paired_differences,
    power,
    seeds_needed,
    trend,
)
from equipoise_lab.reproduce.claim import Claim, Comparison
from equipoise_lab.reproduce.results import Results

__all__ = ["MARGIN_OF", "POWER", "Finding", "check_one_edition", "findings"]

LEVEL = 0.95
_UNDECIDED = judge(estimate([0.0]), Hypothesis("lower"))  # for a claim without runs, without a margin yet, or diverged
POWER = 0.8  # that numbers of seeds are planned for
MARGIN_OF = "1-scope"  # a third of this claim's difference is the default margin of equality


@dataclass(frozen=True)
class Finding:
    """One comparison of a claim, judged by the stored results; without any, estimate and judgement are None."""

    claim: Claim
    comparison: Comparison
    is_primary: bool
    means: Mapping[str, float] = field(default_factory=dict)  # by arm, over the seeds that all arms have
    estimate: Estimate | None = None
    diverged: int = 0  # seeds left out because a run diverged, or has no such statistic
    margin: float | None = None  # of a claim of equality, once it is known
    judgement: Judgement | None = None
    seeds_needed: int | None = None  # to support it with 80 % power if mean and spread stay; None: wrong direction
    power: float | None = None  # of the seeds of the last look, at the spread seen, for the effect they are planned for
    seeds_for_effect: int | None = None  # to support it with 80 % power if that effect is the true one

    @property
    def planned(self) -> int:
        """The number of seeds, at this look."""
        return self.claim.seeds_for(self.comparison)

    @property
    def planned_at_most(self) -> int:
        """The number of seeds at the last look."""
        return self.claim.last_look.seeds_for(self.comparison)

    @property
    def is_finished(self) -> bool:
        """Whether all seeds of this look have run."""
        return self.diverged + (0 if self.estimate is None else self.estimate.n) >= self.planned

    @property
    def is_missing(self) -> bool:
        """Whether nothing ran."""
        return self.estimate is None and not self.diverged

    @property
    def verdict(self) -> str:
        return "undecided" if self.judgement is None else self.judgement.verdict


def findings(claims: Sequence[Claim], results: Results) -> list[Finding]:
    """For each claim its primary comparison, then the others. Primary verdicts are corrected for their number.

    ``claims`` are all those of one edition."""
    check_one_edition(claims)
    margin = _default_margin(claims, results)
    primary = {claim.name: _finding(claim, claim.primary, results, margin, True, len(claims)) for claim in claims}
    family = judge_family(
        {name: finding.judgement or _UNDECIDED for name, finding in primary.items()},
        looks={claim.name: claim.num_looks for claim in claims},
    )
    ordered = []
    for claim in claims:
        first = primary[claim.name]
        ordered.append(first if first.judgement is None else replace(first, judgement=family[claim.name]))
        ordered += [_finding(claim, comparison, results, margin) for comparison in claim.also]
    return ordered


def check_one_edition(claims: Sequence[Claim], edition: str | None = None) -> None:
    """Raises ``EquipoiseError`` unless all claims are of one edition, if it is given of this one."""
    names = {claim.edition for claim in claims} | ({edition} if edition is not None else set())
    if len(names) > 1:
        raise EquipoiseError(
            f"claims that are judged or shown together must be of one edition: got {', '.join(sorted(names))}."
        )


def _default_margin(claims: Sequence[Claim], results: Results) -> float | None:
    """A third of the difference that supports the claim ``MARGIN_OF``; None if its interval holds 0."""
    for claim in claims:
        if claim.name == MARGIN_OF:
            difference = _finding(claim, claim.primary, results, None).estimate
            if difference is not None and difference.n > 1 and difference.interval[1] < 0:
                return -difference.mean / 3
    return None


def _finding(
    claim: Claim,
    comparison: Comparison,
    results: Results,
    margin: float | None,
    is_primary: bool = False,
    family: int = 1,
) -> Finding:
    """``family``: the number of claims that the verdict is corrected for."""
    values = {arm: _values(claim, arm, comparison.statistic, results) for arm in comparison.arms}
    seeds = set.intersection(*(set(by_seed) for by_seed in values.values()))
    paired = {arm: {seed: by_seed[seed] for seed in sorted(seeds)} for arm, by_seed in values.items()}
    margin = (comparison.margin or margin) if comparison.claim == "equal" else None
    planned = claim.all_seeds[: claim.seeds_for(comparison)]
    stored = {seed for seed in planned if _are_stored(claim, comparison, seed, results)}
    finding = Finding(claim, comparison, is_primary, margin=margin, diverged=len(stored - seeds))
    if not seeds:
        return finding
    means = {arm: sum(by_seed.values()) / len(by_seed) for arm, by_seed in paired.items()}
    if comparison.over:
        effect = trend({factor: paired[arm] for arm, factor in comparison.over.items()}, level=LEVEL)
    else:
        effect = paired_differences(paired[comparison.of], paired[comparison.against], level=LEVEL)
    finding = replace(finding, means=means, estimate=effect)
    if comparison.claim == "equal" and margin is None:
        return finding
    if finding.diverged:  # seeds that are left out because of their results leave no valid interval
        return replace(finding, judgement=_UNDECIDED)
    hypothesis = Hypothesis(comparison.claim, margin)  # type: ignore[arg-type]
    finding = replace(finding, judgement=judge(effect, hypothesis))
    if effect.n < 2:
        return finding
    level = 1 - (1 - LEVEL) / (family * (claim.num_looks if is_primary else 1))  # of Holm's first step
    finding = replace(finding, seeds_needed=_seeds_needed(hypothesis, effect.mean, effect.sd, level))
    if comparison.effect is None:
        return finding
    return replace(
        finding,
        power=power(hypothesis, comparison.effect, effect.sd, finding.planned_at_most, level=level),
        seeds_for_effect=_seeds_needed(hypothesis, comparison.effect, effect.sd, level),
    )


def _seeds_needed(hypothesis: Hypothesis, mean: float, sd: float, level: float) -> int | None:
    return seeds_needed(hypothesis, mean, sd, power=POWER, level=level)


def _values(claim: Claim, arm: str, statistic: str, results: Results) -> dict[int, float]:
    """The statistic of the stored runs of ``arm``, by seed; a run without it is left out."""
    names = statistic.split(" - ")
    by_seed: dict[int, float] = {}
    for seed in claim.all_seeds:
        result: dict[str, Any] = (results.get(claim.job(arm, seed)) or {}).get("result", {})
        values = [result[name] for name in names if result.get(name) is not None]
        if len(values) == len(names):
            by_seed[seed] = values[0] - sum(values[1:])
    return by_seed


def _are_stored(claim: Claim, comparison: Comparison, seed: int, results: Results) -> bool:
    """Whether all runs of the comparison with this seed are done, if only because they diverged."""
    return all(results.get(claim.job(arm, seed)) is not None for arm in comparison.arms)
