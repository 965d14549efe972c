"""results of runs -> what they say of each claim. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from equipoise_lab.analysis import (
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
from equipoise_lab.reproduce.claim import Claim, Comparison
from equipoise_lab.reproduce.runs import Results

__all__ = ["MARGIN_OF", "Finding", "findings"]

LEVEL = 0.95
MARGIN_OF = "1-scope"  # the claim whose difference, divided by three, counts as none elsewhere


@dataclass(frozen=True)
class Finding:
    """One comparison of a claim and what the runs that are there say of it; None where there are none."""

    claim: Claim
    comparison: Comparison
    is_primary: bool
    means: Mapping[str, float] = field(default_factory=dict)  # of each arm, over the seeds that all of them have
    estimate: Estimate | None = None
    diverged: int = 0  # seeds that are left out because a run of theirs diverged
    margin: float | None = None  # of a claim of equality, if it is known
    judgement: Judgement | None = None
    seeds_needed: int | None = None  # to support it with 80 % power, by what is seen; None: it points the other way

    @property
    def planned(self) -> int:
        """Seeds."""
        return self.claim.seeds_for(self.comparison)

    @property
    def verdict(self) -> str:
        return "undecided" if self.judgement is None else self.judgement.verdict


def findings(claims: Sequence[Claim], results: Results) -> list[Finding]:
    """The primary comparison of each claim, then its others. Primary verdicts are those of their family (Holm)."""
    margin = _default_margin(claims, results)
    primary = {claim.name: _finding(claim, claim.primary, results, margin, True, len(claims)) for claim in claims}
    nothing = judge(estimate([0.0]), Hypothesis("lower"))  # not run yet, or without a margin yet
    family = judge_family({name: finding.judgement or nothing for name, finding in primary.items()})
    found = []
    for claim in claims:
        first = primary[claim.name]
        found.append(first if first.judgement is None else replace(first, judgement=family[claim.name]))
        found += [_finding(claim, comparison, results, margin) for comparison in claim.also]
    return found


def _default_margin(claims: Sequence[Claim], results: Results) -> float | None:
    """A third of what the claim ``MARGIN_OF`` finds in its own direction; None where its interval holds 0."""
    for claim in claims:
        if claim.name == MARGIN_OF:
            seen = _finding(claim, claim.primary, results, None).estimate
            if seen is not None and seen.n > 1 and seen.interval[1] < 0:
                return -seen.mean / 3
    return None


def _finding(
    claim: Claim,
    comparison: Comparison,
    results: Results,
    margin: float | None,
    is_primary: bool = False,
    family: int = 1,
) -> Finding:
    values = {arm: _values(claim, arm, comparison.statistic, results) for arm in comparison.arms}
    seeds = set.intersection(*(set(by_seed) for by_seed in values.values()))
    paired = {arm: {seed: by_seed[seed] for seed in sorted(seeds)} for arm, by_seed in values.items()}
    margin = (comparison.margin or margin) if comparison.claim == "equal" else None
    diverged = sum(any(_diverged(claim, arm, seed, results) for arm in comparison.arms) for seed in claim.all_seeds)
    found = Finding(claim, comparison, is_primary, margin=margin, diverged=diverged)
    if not seeds:
        return found
    means = {arm: sum(by_seed.values()) / len(by_seed) for arm, by_seed in paired.items()}
    if comparison.over:
        seen = trend({factor: paired[arm] for arm, factor in comparison.over.items()}, level=LEVEL)
    else:
        seen = paired_differences(paired[comparison.of], paired[comparison.against], level=LEVEL)
    found = replace(found, means=means, estimate=seen)
    if comparison.claim == "equal" and margin is None:
        return found
    hypothesis = Hypothesis(comparison.claim, margin)  # type: ignore[arg-type]
    needed = None
    if seen.n > 1:  # at the level of the first step of Holm
        needed = seeds_needed(hypothesis, seen.mean, seen.sd, level=1 - (1 - LEVEL) / family)
    return replace(found, judgement=judge(seen, hypothesis), seeds_needed=needed)


def _values(claim: Claim, arm: str, statistic: str, results: Results) -> dict[int, float]:
    """By seed, the statistic of the runs of ``arm`` that are there and have it."""
    names = statistic.split(" - ")
    found: dict[int, float] = {}
    for seed in claim.all_seeds:
        result: dict[str, Any] = (results.get(claim.job(arm, seed)) or {}).get("result", {})
        values = [result[name] for name in names if result.get(name) is not None]
        if len(values) == len(names):
            found[seed] = values[0] - sum(values[1:])
    return found


def _diverged(claim: Claim, arm: str, seed: int, results: Results) -> bool:
    stored = results.get(claim.job(arm, seed))
    return stored is not None and "diverged" in stored["result"]
