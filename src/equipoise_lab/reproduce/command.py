"""The command: runs what is missing within a budget, then judges the claims by the stored results."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from equipoise_lab.cores import num_cores
from equipoise_lab.paths import check_writable
from equipoise_lab.records import finite
from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.config import RESULTS, Reproduce
from equipoise_lab.reproduce.edition import Edition
from equipoise_lab.reproduce.jobs import Job
from equipoise_lab.reproduce.page import write
from equipoise_lab.reproduce.page.environments import differences
from equipoise_lab.reproduce.page.wording import (
    claimed,
    comparison_text,
    ignored_text,
    number,
    result_text,
    verdict_text,
)
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.runs import Progress, execute
from equipoise_lab.reproduce.verdict import Finding, findings

__all__ = ["as_json", "claim_rows", "reproduce", "table_rows"]


def reproduce(options: Reproduce, progress: Progress) -> list[Finding]:
    """Does the missing runs of the claims as far as the budget goes, and returns the findings, claim by claim, the
    primary one first."""
    options.check()
    edition = options.load_edition()
    names = list(edition.claims) if options.claim == "all" else [options.claim]
    shipped = _shipped_results() if options.results == RESULTS else []
    results = edition.results(options.results, *shipped, dtype=options.dtype)
    _say_what_is_not_read(options.results, edition, results, progress)
    if options.budget != 0:  # the first run takes minutes
        check_writable(options.out, "--out")
        check_writable(options.results, "--results")
    if options.page is not None:
        check_writable(options.page.parent, "the folder of --page")
    if options.budget != 0:
        _run([edition.claims[name] for name in names], options.claim == "all", edition, results, options, progress)
    # Verdicts are corrected for the number of all claims, even if only one is reported.
    all_claims = edition.claims_with_values(results)
    reported = [finding for finding in findings(all_claims, results) if finding.claim.name in names]
    if options.page is not None:
        write(options.page, edition, all_claims, reported, results)
    for claim in all_claims:
        if claim.name in names and (different := differences(claim, results)):
            progress.say(f"the runs of {claim.name} are not alike: {'; '.join(different)}")
    return reported


def _shipped_results() -> list[Path]:
    """The folder with the results that come with equipoise: in the package, or in the clone that it runs from."""
    package = Path(__file__).parent
    return [path for path in (package / "results", package.parents[2] / RESULTS) if path.is_dir()]


def _say_what_is_not_read(root: Path, edition: Edition, results: Results, progress: Progress) -> None:
    if not any(folder.is_dir() for folder in (results.folder, *results.others)):
        progress.say(f"{results.folder} is not a folder, so there are no stored results yet.")
    if outside := len([*root.glob("*.json")]):
        progress.say(
            f"{outside} results in {root} are ignored: those of the {edition.name} edition are read from "
            f"{results.folder}. Move those that are of this edition there."
        )
    if ignored := ignored_text(results.num_results_of_other_recipes, edition.name, edition.recipe):
        progress.say(ignored)


def _run(
    claims: Sequence[Claim],
    is_all: bool,
    edition: Edition,
    results: Results,
    options: Reproduce,
    progress: Progress,
) -> None:
    """Does the missing runs, claim by claim, within the budget. With all claims, the remaining frontiers come last."""
    runner = _Runner(edition, results, options, progress)
    unfinished, left_out = [], []
    for claim in claims:
        progress.say(f"{claim.name}: {claim.title}")
        if text := _missing_text(claim):
            progress.say(
                f"{claim.name} must have its text in {text}: there is no such folder here. The note of the claim says "
                "how to make it. The claim is left out."
            )
            left_out.append(claim.name)
        elif not runner.finish_claim(claim):
            unfinished.append(claim.name)
    if is_all and not runner.finish_frontiers(edition.frontiers):
        unfinished.append("frontiers")
    names = [claim.name for claim in claims if claim.name not in left_out]
    while not unfinished and (later := _undecided(names, edition, results)):
        for claim in later:
            progress.say(f"{claim.name} is undecided: it goes on to {claim.seeds} seeds")
            if not runner.finish(claim.jobs()):
                unfinished.append(claim.name)
    if unfinished or left_out:
        progress.say(
            f"runs are missing for {', '.join([*unfinished, *left_out])}; run the same command again to continue"
        )


class _Runner:
    """Does runs within the budget, which begins with it. Each method returns whether all runs are done."""

    def __init__(self, edition: Edition, results: Results, options: Reproduce, progress: Progress):
        self.edition, self.results, self.options, self.progress = edition, results, options, progress
        self.began = time.monotonic()

    def finish(self, jobs: Sequence[Job]) -> bool:
        budget, minutes_used = self.options.budget, (time.monotonic() - self.began) / 60
        return not self.results.missing(jobs) or execute(
            jobs,
            self.results,
            self.edition.folder(self.options.out),
            self.progress,
            workers=self.options.workers or num_cores(),
            minutes=None if budget is None else max(0.0, budget - minutes_used),
        )

    def finish_frontiers(self, names: Iterable[str]) -> bool:
        """Until their grids no longer grow."""
        frontiers = [self.edition.frontiers[name] for name in names]
        while self.results.missing(jobs := [job for frontier in frontiers for job in frontier.jobs(self.results)]):
            if not self.finish(jobs):
                return False
        return True

    def finish_claim(self, claim: Claim) -> bool:
        """First the frontiers that its arms take values from, then its own runs."""
        if not self.finish_frontiers(claim.frontiers):
            return False
        chosen = {name: self.edition.frontiers[name].chosen(self.results) for name in claim.frontiers}
        jobs = claim.with_values(chosen).jobs()
        return bool(jobs) and self.finish(jobs)


def _missing_text(claim: Claim) -> str | None:
    """A text of its own that the claim needs and that is not here."""
    texts = (str(options["data"]) for options in claim.arms.values() if "data" in options)
    return next((text for text in texts if not Path(text).exists()), None)


def _undecided(names: Iterable[str], edition: Edition, results: Results) -> list[Claim]:
    """The claims that must go on to their next look."""
    primary = [finding for finding in findings(edition.claims_with_values(results), results) if finding.is_primary]
    later = [finding.claim.next_look for finding in primary if finding.verdict == "undecided"]
    return [claim for claim in later if claim is not None and claim.name in names]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    rows = []
    for finding in findings:
        estimate = finding.estimate
        rows.append(
            {
                "edition": finding.claim.edition,
                "claim": finding.claim.name,
                "comparison": str(finding.comparison),
                "primary": finding.is_primary,
                "claimed": finding.comparison.claim,
                "margin": finding.margin,
                "means": dict(finding.means),
                "seeds": 0 if estimate is None else estimate.n,
                "planned": finding.planned,
                "diverged": finding.diverged,
                "mean": None if estimate is None else estimate.mean,
                "interval": None if estimate is None or estimate.n < 2 else list(estimate.interval),
                "verdict": "not run" if finding.is_missing else finding.verdict,
                "p_adjusted": None if finding.judgement is None else finding.judgement.p_adjusted,
                "seeds_needed": finding.seeds_needed,
                "effect": finding.comparison.effect,
                "power": finding.power,
            }
        )
    return finite(rows)


def table_rows(findings: list[Finding]) -> list[tuple[str, ...]]:
    """One row per finding, in the words of the page: comparison, claim, means of the arms, difference, verdict."""
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
    """One row per claim, by its primary comparison."""
    rows = []
    for finding in findings:
        if finding.is_primary:
            result = "" if finding.is_missing else result_text(finding)
            rows.append((finding.claim.name, verdict_text(finding, is_short=True), result))
    return rows
