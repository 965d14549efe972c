"""Findings -> pages in Markdown: one with the verdicts, and beside it some with the details of the claims and one with
the frontiers, the noise and the runs. What they say beside figures is the edition's (``page.toml``)."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.edition import Edition
from equipoise_lab.reproduce.page.details import details
from equipoise_lab.reproduce.page.evidence import frontiers, noise, runs
from equipoise_lab.reproduce.page.leaderboard import leaderboard
from equipoise_lab.reproduce.page.wording import comparison_text, result_text, verdict_text
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import Finding, check_one_edition

__all__ = ["figure_of", "pages", "write"]

RESULTS, RUNS = "results", "runs"  # the page of verdicts; the others add their part to its name: results_runs.md
CLAIM_NAME = re.compile(r"\b\d-[a-z][a-z-]*")


def figure_of(edition: Edition) -> Path:
    """The figure of an edition, relative to the folder of its pages."""
    return _beside_pages(edition, edition.page.figure)


def _beside_pages(edition: Edition, file: str) -> Path:
    """A file of the repository, relative to the folder of the pages."""
    return Path(os.path.relpath(file, Path(edition.page.path).parent))


def pages(
    name: str,
    edition: Edition,
    claims: Sequence[Claim],
    findings: Sequence[Finding],
    results: Results,
    figure: Path | None = None,
) -> dict[str, str]:
    """The text of each page by its file name: ``name`` has the verdicts, the others the details. ``figure`` shows the
    frontiers and the leaderboard; its path is relative to the pages."""
    check_one_edition(claims, edition.name)
    files = {RESULTS: name}
    for part in (*edition.page.parts, RUNS):
        files[part] = Path(name).with_stem(f"{Path(name).stem}_{part}").name
    addresses = {part: quote(file) for part, file in files.items()}
    part_of = {claim.name: edition.page.part_of(claim.name) for claim in claims}
    links = {name: f"[{name}]({addresses[part]}#{name})" for name, part in part_of.items()}

    def linked(text: str) -> str:
        """The text with a link at each name of a claim."""
        return CLAIM_NAME.sub(lambda match: links.get(match[0], match[0]), text)

    lines = {RESULTS: _verdicts(edition, addresses, claims, findings, results, links, figure)}
    lines[RESULTS] += ["", "## Limits", "", linked(edition.page.limits)]
    for part, text in edition.page.parts.items():
        of_part = [claim for claim in claims if part_of[claim.name] == part]
        lines[part] = [text["head"].format(**addresses), edition.page.details.format(**addresses)]
        have_runs = {finding.claim.name for finding in findings if finding.is_primary and not finding.is_missing}
        figures = {} if figure is None else edition.page.claim_figures
        pictures = {
            name: _beside_pages(edition, file).as_posix() for name, file in figures.items() if name in have_runs
        }
        lines[part] += details(of_part, findings, results, linked, pictures)
    lines[RUNS] = [edition.page.runs.format(**addresses)]
    lines[RUNS] += frontiers(edition, f"{addresses[RESULTS]}#quality-against-balance", results)
    lines[RUNS] += [*noise(findings), *runs(edition, claims, results)]
    return {file: "\n".join(lines[part]).rstrip("\n") + "\n" for part, file in files.items()}


def _verdicts(
    edition: Edition,
    addresses: Mapping[str, str],
    claims: Sequence[Claim],
    findings: Sequence[Finding],
    results: Results,
    links: Mapping[str, str],
    figure: Path | None,
) -> list[str]:
    primary = [finding for finding in findings if finding.is_primary]
    differences = {finding.claim.name: result_text(finding) for finding in primary}
    lines = [edition.page.head.format(**addresses, **differences)]
    groups = {finding.claim.name: finding.verdict if finding.is_finished else "unfinished" for finding in primary}
    for verdict in ("supported", "not supported", "undecided", "unfinished"):
        of_verdict = [links[name] for name, group in groups.items() if group == verdict]
        if verdict == "unfinished" and not of_verdict:
            continue
        listed = f" {', '.join(of_verdict)}." if of_verdict else ""
        lines.append(f"- **{verdict.capitalize()}: {len(of_verdict)} of {len(primary)}.**{listed}")
    lines += ["", "| claim | reported | here | verdict |", "|---|---|---|---|"]
    for finding in primary:
        claim = finding.claim
        cells = (
            f"{links[claim.name]}: {claim.title}",
            f"{claim.paper} ({claim.source})",
            f"{comparison_text(finding)}: {result_text(finding)}",
            verdict_text(finding),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", edition.page.reading.format(**addresses), "## Quality against balance", ""]
    board = edition.page.leaderboard
    if figure is not None:
        lines += [f"![Loss against MaxVio: the frontiers, and the arms of claim {board}]({figure.as_posix()})", ""]
    for claim in claims:
        if claim.name == board:
            lines += leaderboard(claim, links[claim.name], results)
    return [*lines, edition.page.sources.format(**addresses)]


def write(path: Path, edition: Edition, claims: Sequence[Claim], findings: Sequence[Finding], results: Results) -> None:
    """Writes the page of verdicts to ``path`` and the others beside it, with the figure if its file exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = figure_of(edition) if (path.parent / figure_of(edition)).exists() else None
    for name, text in pages(path.name, edition, claims, findings, results, figure).items():
        path.with_name(name).write_text(text, encoding="utf-8")
