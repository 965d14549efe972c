"""The details of claims: their notes, comparisons and arms, and what their runs were made with."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.page.environments import made_with_line
from equipoise_lab.reproduce.page.wording import (
    claimed,
    comparison_text,
    number,
    options_text,
    power_text,
    result_text,
    verdict_text,
)
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import Finding

__all__ = ["details"]

SHARED_NOTES = "Notes for several claims"
SENTENCE_END = re.compile(r"(?<=[.]) (?=[A-Z])")


def details(
    claims: Sequence[Claim],
    findings: Sequence[Finding],
    results: Results,
    linked: Callable[[str], str],
    pictures: Mapping[str, str],
) -> Iterator[str]:
    """First the notes that several claims have, each once; then a section a claim. ``pictures``: addresses by claim."""
    claims_by_sentence: dict[str, tuple[str, ...]] = {}
    for claim in claims:
        for sentence in _sentences(claim):
            claims_by_sentence[sentence] = (*claims_by_sentence.get(sentence, ()), claim.name)
    shared: dict[tuple[str, ...], list[str]] = {}
    for sentence, claim_names in claims_by_sentence.items():
        if len(claim_names) > 1:
            shared.setdefault(claim_names, []).append(sentence)
    if shared:
        yield from (f"## {SHARED_NOTES}", "")
        for claim_names, sentences in shared.items():
            yield linked(f"- {', '.join(claim_names)}: {' '.join(sentences)}")
        yield ""
    for claim in claims:
        sentences = _sentences(claim)
        note = [sentence for sentence in sentences if len(claims_by_sentence[sentence]) == 1]
        if len(note) < len(sentences):
            note.append(f"See also [{SHARED_NOTES}](#{SHARED_NOTES.lower().replace(' ', '-')}).")
        of_claim = [finding for finding in findings if finding.claim.name == claim.name]
        yield from _section(claim, linked(" ".join(note)), of_claim, results, pictures.get(claim.name))


def _sentences(claim: Claim) -> list[str]:
    return SENTENCE_END.split(claim.note) if claim.note else []


def _section(
    claim: Claim, note: str, findings: Sequence[Finding], results: Results, picture: str | None
) -> Iterator[str]:
    yield from (f"## {claim.name}", "", f"{claim.title}.", "", f"Reported ({claim.source}): {claim.paper}.", "")
    if note:
        yield from (note, "")
    if picture is not None:
        yield from (f"![Claim {claim.name}]({picture})", "")
    yield from ("| comparison | claimed | means of the arms | here | verdict |", "|---|---|---|---|---|")
    for finding in findings:
        statistic = finding.comparison.statistic
        means = ", ".join(f"{arm} {number(mean, statistic)}" for arm, mean in finding.means.items())
        cells = (comparison_text(finding), claimed(finding), means, result_text(finding), verdict_text(finding))
        yield f"| {' | '.join(cells)} |"
    yield from ("", "| arm | options |", "|---|---|")
    yield from (f"| {arm} | {options_text(options)} |" for arm, options in claim.arms.items())
    for text in (*map(power_text, findings), made_with_line(claim, results)):
        if text:
            yield from ("", text)
    yield ""
