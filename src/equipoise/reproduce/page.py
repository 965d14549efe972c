"""findings -> a page in Markdown: claim by claim what is reported, what came out here, and how to get it again."""

from collections.abc import Sequence
from pathlib import Path

from equipoise.reproduce.claim import SIZES, Claim
from equipoise.reproduce.runs import Results
from equipoise.reproduce.verdict import Finding

__all__ = ["number", "page", "says"]

DIGITS = {"val_nats": 4, "val_perplexity": 2}
LIMITS = """These are small models, trained for minutes on the packaged text. What holds here need not hold at scale,
and what is undecided here may be plain there. Micro-batches hold text of one domain each, so the differences between
scopes are upper bounds. An interval is of the seeds (weights, data and domain order together), not of other texts,
sizes or learning rates."""


def number(value: float, statistic: str) -> str:
    return f"{value:.{DIGITS.get(statistic, 3)}f}".replace("-", "−")


def says(finding: Finding) -> str:
    """The difference, or the slope, with its interval."""
    estimate = finding.estimate
    if estimate is None:
        return "no run yet"
    name = finding.comparison.statistic
    if estimate.n < 2:
        return f"{number(estimate.mean, name)} (one seed)"
    low, high = (number(end, name) for end in estimate.interval)
    return f"{number(estimate.mean, name)} [{low}, {high}], {estimate.n} seeds"


def _verdict(finding: Finding) -> str:
    if finding.verdict != "undecided" or finding.judgement is None:
        return finding.verdict
    if finding.seeds_needed is None:
        return "undecided; points the other way" if finding.estimate and finding.estimate.n > 1 else "undecided"
    return f"undecided; about {finding.seeds_needed} seeds would"


def page(claims: Sequence[Claim], found: Sequence[Finding], results: Results) -> str:
    lines = [
        "# What the papers claim, at the size of a laptop",
        "",
        "Written by `equipoise reproduce all --page docs/results.md` from the results of runs in",
        "[benchmarks/results/claims](../benchmarks/results/claims), one file a run. Do not edit it by hand.",
        "",
        "Arms of a claim start from the same weights and see the same micro-batches in the same order; a seed changes",
        "all of them together, and differences are taken seed by seed. In brackets: the 95 % t interval of their mean.",
        "*Supported*: it lies wholly on the claim's side; *not supported*: wholly on the other; else *undecided*.",
        "Verdicts on the first row of each claim are corrected for their number (Holm).",
        "",
        "| claim | reported | here | verdict |",
        "|---|---|---|---|",
    ]
    for finding in found:
        if finding.is_primary:
            claim = finding.claim
            shown = f"{finding.comparison}: {says(finding)}"
            lines.append(
                f"| [{claim.title}](#{claim.name}) | {claim.paper} ({claim.source}) | {shown} | {_verdict(finding)} |"
            )
    lines += ["", "## Limits", "", LIMITS]
    for claim in claims:
        lines += ["", f"## {claim.name}", "", f"{claim.title}. {claim.source}: {claim.paper}.", ""]
        if claim.note:
            lines += [claim.note, ""]
        lines += ["| comparison | claimed | means of the arms | here | verdict |", "|---|---|---|---|---|"]
        for finding in (each for each in found if each.claim.name == claim.name):
            comparison = finding.comparison
            means = ", ".join(f"{arm} {number(mean, comparison.statistic)}" for arm, mean in finding.means.items())
            lines.append(f"| {comparison} | {comparison.claim} | {means} | {says(finding)} | {_verdict(finding)} |")
        stored = [result for job in claim.jobs() if (result := results.get(job)) is not None]
        arms = "; ".join(f"{arm}: `{options['strategy']}`" for arm, options in claim.arms.items())
        options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in SIZES[claim.size].items())
        lines += ["", f"`equipoise reproduce {claim.name}`. Arms: {arms}. Size {claim.size}: {options}."]
        if stored:
            dates = sorted(result["began"][:10] for result in stored)
            minutes = sum(result["seconds"] for result in stored) / 60
            versions = ", ".join(f"{name} {version}" for name, version in stored[-1]["versions"].items())
            lines += [
                f"{len(stored)} of {len(claim.jobs())} runs, {minutes:.0f} minutes of one core, "
                f"{stored[-1]['hardware']}, {dates[0]} to {dates[-1]}, {versions}."
            ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
