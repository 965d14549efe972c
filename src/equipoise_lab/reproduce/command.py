"""The command: runs what is missing within a budget, then says what the runs say."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from equipoise_lab.cores import num_cores
from equipoise_lab.records import finite
from equipoise_lab.reproduce.claim import Claim, Job, claim_names, load_claim
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.frontier import FRONTIERS
from equipoise_lab.reproduce.page import claimed, concludes, named, number, says, write
from equipoise_lab.reproduce.runs import Progress, Results, execute
from equipoise_lab.reproduce.verdict import Finding, findings

__all__ = ["as_json", "reproduce", "table_rows"]


def reproduce(asked: Reproduce, progress: Progress) -> list[Finding]:
    """Gets the runs of the claims done, as far as the budget goes, and returns what they say, primary ones first in
    each claim."""
    asked.check()
    names = claim_names() if asked.claim == "all" else [asked.claim]
    if not asked.results.is_dir():
        progress.say(
            f"{asked.results} is no folder: no results are there yet. Ours are in the repository, in "
            "benchmarks/results/claims: run it there, or give that folder with --results."
        )
    results = Results(asked.results, dtype=asked.dtype)
    if asked.budget != 0:
        _run([load_claim(name) for name in names], asked.claim == "all", results, asked, progress)
    chosen = {name: frontier.chosen(results) for name, frontier in FRONTIERS.items()}
    everything = [load_claim(name).with_values(chosen) for name in claim_names()]  # whoever is asked, the family is all
    found = [finding for finding in findings(everything, results) if finding.claim.name in names]
    if asked.page is not None:
        write(asked.page, everything, found, results)
    return found


def _run(claims: Sequence[Claim], is_all: bool, results: Results, asked: Reproduce, progress: Progress) -> None:
    """Claim by claim: first the frontiers that its arms take values from, as long as they grow; then its runs. With all
    claims the remaining frontiers too, last."""
    began = time.monotonic()
    workers = asked.workers or num_cores()

    def done(jobs: Sequence[Job]) -> bool:
        left = None if asked.budget is None else max(0.0, asked.budget - (time.monotonic() - began) / 60)
        return not results.missing(jobs) or execute(jobs, results, asked.out, progress, workers=workers, minutes=left)

    def explored(names: Iterable[str]) -> bool:
        while results.missing(jobs := [job for name in names for job in FRONTIERS[name].jobs(results)]):
            if not done(jobs):
                return False
        return True

    left = []
    for claim in claims:
        progress.say(f"{claim.name}: {claim.title}")
        chosen = {}
        if explored(claim.frontiers):
            chosen = {name: FRONTIERS[name].chosen(results) for name in claim.frontiers}
        if not (claim := claim.with_values(chosen)).jobs() or not done(claim.jobs()):
            left.append(claim.name)
    if is_all and not explored(FRONTIERS):
        left.append("frontiers")
    if left:
        progress.say(f"runs are left of {', '.join(left)}; the same command goes on with them")


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
                "margin": finding.margin,
                "means": dict(finding.means),
                "seeds": 0 if estimate is None else estimate.n,
                "diverged": finding.diverged,
                "mean": None if estimate is None else estimate.mean,
                "interval": None if estimate is None or estimate.n < 2 else list(estimate.interval),
                "verdict": finding.verdict,
                "p_adjusted": None if finding.judgement is None else finding.judgement.p_adjusted,
                "seeds_needed": finding.seeds_needed,
            }
        )
    return finite(rows)


def table_rows(found: list[Finding]) -> list[tuple[str, ...]]:
    """What a terminal shows of a claim, in the words of the page, the row that decides first: comparison, what is
    claimed of it, figures, verdict."""
    return [
        (
            named(finding),
            claimed(finding),
            ", ".join(f"{arm} {number(mean, finding.comparison.statistic)}" for arm, mean in finding.means.items()),
            says(finding),
            concludes(finding),
        )
        for finding in found
    ]
