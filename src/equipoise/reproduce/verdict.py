"""results of runs -> what they say of each claim. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.analysis import (
    Estimate,
    Hypothesis,
    Judgement,
    estimate,
    judge,
    judge_family,
    paired_differences,
    seeds_needed,
    trend,
)
from equipoise.reproduce.claim import Claim, Comparison
from equipoise.reproduce.runs import Results

__all__ = ["Finding", "findings"]

LEVEL = 0.95


@dataclass(frozen=True)
class Finding:
    """One comparison of a claim and what the runs that are there say of it; ``judgement`` is None without any."""

    claim: Claim
    comparison: Comparison
    is_primary: bool
    means: Mapping[str, float]  # of each arm, over the seeds that all of them have
    judgement: Judgement | None
    seeds_needed: int | None  # to support it with 80 % power, by what is seen; None where it points the other way

    @property
    def estimate(self) -> Estimate | None:
        return None if self.judgement is None else self.judgement.estimate

    @property
    def verdict(self) -> str:
        return "undecided" if self.judgement is None else self.judgement.verdict


def findings(claims: Sequence[Claim], results: Results) -> list[Finding]:
    """The primary comparison of each claim, then its others. Primary verdicts are those of their family (Holm)."""
    primary = {claim.name: _finding(claim, claim.primary, True, results, len(claims)) for claim in claims}
    nothing = {claim.name: judge(estimate([0.0]), _hypothesis(claim.primary)) for claim in claims}  # not run yet
    family = judge_family({name: finding.judgement or nothing[name] for name, finding in primary.items()})
    found = []
    for claim in claims:
        first = primary[claim.name]
        judgement = None if first.judgement is None else family[claim.name]
        found.append(Finding(claim, first.comparison, True, first.means, judgement, first.seeds_needed))
        found += [_finding(claim, comparison, False, results) for comparison in claim.also]
    return found


def _finding(claim: Claim, comparison: Comparison, is_primary: bool, results: Results, family: int = 1) -> Finding:
    values = {arm: _values(claim, arm, comparison.statistic, results) for arm in comparison.arms}
    seeds = set.intersection(*(set(by_seed) for by_seed in values.values()))
    paired = {arm: {seed: by_seed[seed] for seed in sorted(seeds)} for arm, by_seed in values.items()}
    means = {arm: sum(by_seed.values()) / len(by_seed) for arm, by_seed in paired.items()} if seeds else {}
    if not seeds:
        return Finding(claim, comparison, is_primary, means, None, None)
    if comparison.over:
        seen = trend({factor: paired[arm] for arm, factor in comparison.over.items()}, level=LEVEL)
    else:
        seen = paired_differences(paired[comparison.of], paired[comparison.against], level=LEVEL)
    hypothesis = _hypothesis(comparison)
    needed = None
    if seen.n > 1:  # at the level of the first step of Holm
        needed = seeds_needed(hypothesis, seen.mean, seen.sd, level=1 - (1 - LEVEL) / family)
    return Finding(claim, comparison, is_primary, means, judge(seen, hypothesis), needed)


def _hypothesis(comparison: Comparison) -> Hypothesis:
    return Hypothesis(comparison.claim, comparison.margin)  # type: ignore[arg-type]


def _values(claim: Claim, arm: str, statistic: str, results: Results) -> dict[int, float]:
    found: dict[int, Any] = {}
    for seed in range(claim.seeds):
        stored = results.get(claim.job(arm, seed))
        if stored is not None and stored["result"].get(statistic) is not None:
            found[seed] = stored["result"][statistic]
    return found
