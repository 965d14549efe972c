"""The command: runs what is missing within a budget, then says what the runs say."""

import os
from typing import Any

from equipoise.records import finite
from equipoise.reproduce.claim import claim_names, load_claim
from equipoise.reproduce.config import Reproduce
from equipoise.reproduce.page import number, page, says, write
from equipoise.reproduce.runs import Progress, Results, execute
from equipoise.reproduce.verdict import Finding, findings

__all__ = ["as_json", "reproduce", "table_rows"]


def reproduce(asked: Reproduce, progress: Progress) -> list[Finding]:
    """Gets the runs of the claims done, as far as the budget goes, and returns what they say, primary ones first in
    each claim."""
    asked.check()
    claims = [load_claim(name) for name in (claim_names() if asked.claim == "all" else [asked.claim])]
    results = Results(asked.results)
    jobs = [job for claim in claims for job in claim.jobs()]
    if asked.budget != 0:
        whole = execute(
            jobs,
            results,
            asked.out,
            progress,
            workers=asked.workers or os.cpu_count() or 1,
            minutes=asked.budget,
        )
        if not whole:
            progress.say(
                f"{len(results.missing(jobs))} of {len(set(jobs))} runs are left; the same command goes on with them"
            )
    everything = [load_claim(name) for name in claim_names()]  # the family of verdicts is all claims, whoever is asked
    found = [finding for finding in findings(everything, results) if finding.claim.name in {c.name for c in claims}]
    if asked.page is not None:
        write(asked.page, page(claims, found, results))
    return found


def as_json(found: list[Finding]) -> list[dict[str, Any]]:
    rows = []
    for finding in found:
        estimate = finding.estimate
        rows.append(
            {
                "claim": finding.claim.name,
                "comparison": str(finding.comparison),
                "primary": finding.is_primary,
                "claimed": finding.comparison.claim,
                "means": dict(finding.means),
                "seeds": 0 if estimate is None else estimate.n,
                "mean": None if estimate is None else estimate.mean,
                "interval": None if estimate is None or estimate.n < 2 else list(estimate.interval),
                "verdict": finding.verdict,
                "p_adjusted": None if finding.judgement is None else finding.judgement.p_adjusted,
                "seeds_needed": finding.seeds_needed,
            }
        )
    return finite(rows)


def table_rows(found: list[Finding]) -> list[tuple[str, ...]]:
    """What a terminal shows: claim, comparison, figures, verdict."""
    return [
        (
            finding.claim.name if finding.is_primary else "",
            str(finding.comparison),
            ", ".join(f"{arm} {number(mean, finding.comparison.statistic)}" for arm, mean in finding.means.items()),
            says(finding),
            finding.verdict,
        )
        for finding in found
    ]
