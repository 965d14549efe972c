"""The command: runs what is missing within a budget, then judges the claims by the stored results."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from equipoise_lab.cores import num_cores
from equipoise_lab.paths import check_writable
from equipoise_lab.records import finite
from equipoise_lab.reproduce.claim import Claim, Job, claim_names, load_claim
from equipoise_lab.reproduce.config import RESULTS, Reproduce
from equipoise_lab.reproduce.frontier import FRONTIERS
from equipoise_lab.reproduce.page import claimed, comparison_text, number, result_text, verdict_text, write
from equipoise_lab.reproduce.runs import Progress, Results, execute
from equipoise_lab.reproduce.verdict import Finding, findings

__all__ = ["as_json", "claim_rows", "reproduce", "table_rows"]


def reproduce(options: Reproduce, progress: Progress) -> list[Finding]:
    """Does the missing runs of the claims as far as the budget goes, and returns the findings, claim by claim, the
    primary one first."""
    options.check()
    names = claim_names() if options.claim == "all" else [options.claim]
    shipped = _shipped_results() if options.results == RESULTS else []
    if not options.results.is_dir() and not shipped:
        progress.say(f"{options.results} is not a folder, so there are no stored results yet.")
    if options.budget != 0:  # the first run takes minutes
        check_writable(options.out, "--out")
        check_writable(options.results, "--results")
    if options.page is not None:
        check_writable(options.page.parent, "the folder of --page")
    results = Results(options.results, *shipped, dtype=options.dtype)
    if options.budget != 0:
        _run([load_claim(name) for name in names], options.claim == "all", results, options, progress)
    chosen = {name: frontier.chosen(results) for name, frontier in FRONTIERS.items()}
    # Verdicts are corrected for the number of all claims, even if only one is reported.
    all_claims = [load_claim(name).with_values(chosen) for name in claim_names()]
    reported = [finding for finding in findings(all_claims, results) if finding.claim.name in names]
    if options.page is not None:
        write(options.page, all_claims, reported, results)
    return reported


def _shipped_results() -> list[Path]:
    """The folder with the results that come with equipoise: in the package, or in the clone that it runs from."""
    package = Path(__file__).parent
    return [path for path in (package / "results", package.parents[2] / RESULTS) if path.is_dir()]


def _run(claims: Sequence[Claim], is_all: bool, results: Results, options: Reproduce, progress: Progress) -> None:
    """Does the missing runs, claim by claim: first the frontiers that its arms take values from, until their grids no
    longer grow, then its own runs. With all claims, the remaining frontiers come last."""
    began = time.monotonic()
    workers = options.workers or num_cores()

    def finish(jobs: Sequence[Job]) -> bool:
        minutes = None if options.budget is None else max(0.0, options.budget - (time.monotonic() - began) / 60)
        return not results.missing(jobs) or execute(
            jobs, results, options.out, progress, workers=workers, minutes=minutes
        )

    def finish_frontiers(names: Iterable[str]) -> bool:
        while results.missing(jobs := [job for name in names for job in FRONTIERS[name].jobs(results)]):
            if not finish(jobs):
                return False
        return True

    unfinished = []
    for claim in claims:
        progress.say(f"{claim.name}: {claim.title}")
        chosen = {}
        if finish_frontiers(claim.frontiers):
            chosen = {name: FRONTIERS[name].chosen(results) for name in claim.frontiers}
        if not (claim := claim.with_values(chosen)).jobs() or not finish(claim.jobs()):
            unfinished.append(claim.name)
    if is_all and not finish_frontiers(FRONTIERS):
        unfinished.append("frontiers")
    if unfinished:
        progress.say(f"runs are missing for {', '.join(unfinished)}; run the same command again to continue")


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    rows = []
    for finding in findings:
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
                "verdict": "not run" if finding.is_missing else finding.verdict,
                "p_adjusted": None if finding.judgement is None else finding.judgement.p_adjusted,
                "seeds_needed": finding.seeds_needed,
            }
        )
    return finite(rows)


def table_rows(findings: list[Finding]) -> list[tuple[str, ...]]:
    """A row a finding, in the words of the page: comparison, claim, means of the arms, difference, verdict."""
    return [
        (
            comparison_text(finding),
            claimed(finding),
            ", ".join(f"{arm} {number(mean, finding.comparison.statistic)}" for arm, mean in finding.means.items()),
            result_text(finding),
            verdict_text(finding),
        )
        for finding in findings
    ]


def claim_rows(findings: list[Finding]) -> list[tuple[str, str, str]]:
    """A row a claim, by its primary comparison."""
    rows = []
    for finding in findings:
        if finding.is_primary and finding.is_missing:
            rows.append((finding.claim.name, "not run", ""))
        elif finding.is_primary:
            rows.append((finding.claim.name, finding.verdict, result_text(finding)))
    return rows
