"""Findings -> pages in Markdown: one with the verdicts, and beside it two with the details of the claims and one with
the frontiers, the noise and the runs."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from equipoise_lab.analysis import detectable_effect
from equipoise_lab.reproduce.claim import SIZES, Claim
from equipoise_lab.reproduce.frontier import FRONTIERS, Frontier
from equipoise_lab.reproduce.runs import Results
from equipoise_lab.reproduce.verdict import Finding

__all__ = [
    "FIGURE",
    "LEADERBOARD",
    "arms",
    "claimed",
    "comparison_text",
    "number",
    "pages",
    "result_text",
    "verdict_text",
    "write",
]

NAMES = {
    "val_nats": "loss",
    "train_nats": "training loss",
    "maxvio_global": "MaxVio",
    "maxvio_micro": "MaxVio of micro-batches",
    "domain_information_bits": "domain information",
    "max_domain_share": "largest domain share",
    "topk_score_sum": "top-k score sum",
}
DIGITS = {"val_nats": 4, "train_nats": 4, "val_nats - train_nats": 4}
LEADERBOARD = "8-leaderboard"  # the claim with a table of all its arms
LEADERBOARD_STATISTICS = ("val_nats", "maxvio_global", "domain_information_bits")
FIGURE = Path("..", "figures", "claims.png")  # beside the folder of the page
MOST_SEEDS_NAMED = 100  # an estimate above it is too uncertain to print
LEAST_SEEDS_TO_ESTIMATE = 3  # with fewer, the spread is too uncertain to say how many seeds are needed
RESULTS = "results"  # the page of verdicts; those of the details add their part to its name: results_scope.md
SCOPE, MECHANISMS, RUNS = "scope", "mechanisms", "runs"
CLAIMS_ABOUT_SCOPE = ("1-", "2-", "3-", "7-")
SHARED_NOTES = "Notes for several claims"
SENTENCE_END = re.compile(r"(?<=[.]) (?=[A-Z])")
CLAIM_NAME = re.compile(r"\b\d-[a-z][a-z-]*")
HEAD = """# What the papers claim, at the size of a laptop

This page says what our small runs show of the claims of papers. It has a verdict for each claim, and the limits of this
evidence. [How claims are tested](claims.md) has the rules. Three pages have the details:

- [Claims about scope]({scope}): over which tokens the balancing counts (claims 1, 2, 3 and 7).
- [Claims about mechanisms]({mechanisms}): losses, biases, expert choice and the recipe (claims 4, 5, 6, 8 and 9).
- [Frontiers, noise and runs]({runs}): how coefficients were chosen, and how much results vary from seed to seed.

`equipoise reproduce all --page docs/evidence/results.md` writes these four pages from
[benchmarks/results/claims](../../benchmarks/results/claims), one file per run. Do not edit them by hand. With
`--results runs/mine` the command makes all runs again. With `--budget 0` it lists the claims.

## Verdicts
"""
READING = """## How to read it

- **Differences.** The arms of a claim start from the same weights and see the same micro-batches in the same order. A
  seed changes all of these together. Differences are taken seed by seed. Brackets hold the 95 % t interval of the mean
  difference.
- **Verdicts.** A claim is *supported* if the interval lies wholly on its side. For *equal* that means inside the
  margin. It is *not supported* if the interval lies wholly on the other side. Otherwise it is *undecided*. Then the
  page says how many seeds would support it if mean and spread stayed the same.
- **First rows.** The first row in the details of a claim decides it. These verdicts are corrected for the number of
  claims (Holm). So an interval may exclude 0 although its claim is undecided.
- **Other rows.** They are not corrected; each stands alone.
- **Shared runs.** Claims share runs, above all those with the loss over a micro-batch and over the global batch. So
  their verdicts are not independent.
- **Loss** is the mean cross-entropy of the test text, in nats per token.
- **MaxVio** is that of the test text; 0 is perfectly even.
- **Domain information** says how much the choice of an expert tells about the domain, in bits.
- **Coefficients and rates** are those chosen on the [frontiers]({runs}#frontiers), unless an arm has its own.
- **Model.** It is the default of `equipoise train`.
  It has 3 layers of width 128, 32 experts and a shared one, 4 experts per token.
  A step has 8 micro-batches of 1,024 tokens, each of one of 8 domains.
  Size small has 80 steps, standard 200.
  Forwards run under bfloat16 autocast, unless a claim says float32.
"""
SCOPE_HEAD = """# Claims about scope

This page has the details of claims 1, 2, 3 and 7. They ask over which tokens balancing should count: within a
micro-batch, or over the global batch.
"""
MECHANISMS_HEAD = """# Claims about mechanisms

This page has the details of claims 4, 5, 6 and 8. They compare mechanisms: losses, biases and expert choice. Claim 9
tests the recipe of all runs.
"""
DETAILS = """[How to read it]({results}#how-to-read-it) explains the tables. [Noise and power]({runs}#noise-and-power)
has the spread over seeds. [Runs]({runs}#runs) has the options of each size.

`equipoise reproduce CLAIM` makes the runs of a claim that are missing, and shows its verdicts.
"""
RUNS_HEAD = """# Frontiers, noise and runs

This page has what the verdicts on [What the papers claim]({results}) rest on: how coefficients and rates were chosen,
how much differences vary from seed to seed, and which runs there are.
"""
LIMITS = """These are small models, trained for minutes on the packaged text. A result here need not hold at scale. A
difference that is undecided here may be clear there.

- **Text.** Each micro-batch holds text of one domain, so the differences between scopes are upper bounds. An interval
  is over seeds: weights, data and the order of domains together. It is not over other texts, sizes or learning rates.
- **Tuning.** Coefficients and rates are chosen in short runs with two seeds, so noise may put an arm off its best.
- **Length.** A number that suits 80 steps need not suit 200, and Loss-Free's rate does not. Three claims have an arm at
  a third of it (4-loss-free, 4-loss-free-same-scope, 5-rules), and that arm is far better. It was added after the other
  results were known, and no other mechanism got a second try. So it stands beside the verdicts and does not count in
  them.
- **Learning rate.** All arms share one. An arm that would gain most from another one is at a disadvantage.
- **Changes of the library.** The runs were made over days, while the library changed. A change in rounding moves a loss
  as another seed would, in no particular direction. So pairs of arms from before and after a change are noisier, but
  not biased.
- **Recipe.** Norms, learning rate and length were chosen so that the difference of claim 1-scope is visible at all.
  They were chosen on seeds 0 to 3, which that claim uses too. Claim 9-recipe tests other recipes.
- **Margin.** The margin of *equal* is a third of the difference in claim 1-scope. This rule was fixed beforehand. The
  number was not, and it is larger than the differences that the papers report."""
SOURCES = """Some arms and frontiers are not of the library:

- `phi` is phi-balancing (arXiv:2605.15403).
- `shinka` is a loss found by program search (ShinkaEvolve, arXiv:2509.19349).
- `shuffle` is the control of arXiv:2501.11873, Table 2.
- Expert choice, Sinkhorn and hash are ways to choose experts without a balancer.

The formulas, and where we differ from the papers, are in
[balancers.py](../../src/equipoise_lab/train/balancers.py) and
[selection.py](../../src/equipoise_lab/train/selection.py)."""


def number(value: float, statistic: str) -> str:
    return f"{value:.{DIGITS.get(statistic, 3)}f}".replace("-", "−")


def result_text(finding: Finding) -> str:
    """The difference or slope, with its interval and number of seeds."""
    estimate = finding.estimate
    if estimate is None:
        return "no run yet"
    name = finding.comparison.statistic
    if estimate.n < 2:
        return f"{number(estimate.mean, name)} (one seed)"
    low, high = (number(end, name) for end in estimate.interval)
    planned = finding.planned
    seeds = f"{estimate.n} seeds" if estimate.n == planned else f"{estimate.n} of {planned} seeds"
    if finding.diverged:
        seeds += f", {finding.diverged} diverged"
    return f"{number(estimate.mean, name)} [{low}, {high}], {seeds}"


def _effort(claims: Sequence[Claim], results: Results) -> str:
    """How long the runs of all claims and frontiers took; shared runs count once."""
    jobs = [job for claim in claims for job in claim.planned()]
    jobs += [job for frontier in FRONTIERS.values() for job in frontier.jobs(results)]
    jobs = list(dict.fromkeys(jobs))
    seconds_by_kind: dict[Any, list[float]] = {}  # by steps and precision
    for job in jobs:
        if (stored := results.get(job)) is not None:
            options = stored["options"]
            seconds_by_kind.setdefault((options.get("steps"), options.get("dtype")), []).append(stored["seconds"])
    hours = sum(map(sum, seconds_by_kind.values())) / 3600
    quickest = sum(len(seconds) * min(seconds) for seconds in seconds_by_kind.values()) / 3600
    return (
        f"All claims and frontiers: {sum(map(len, seconds_by_kind.values()))} of {len(jobs)} runs. Their steps took "
        f"{hours:.1f} hours of one core; {quickest:.1f} if every run were as fast as the fastest of equal length and "
        "precision."
    )


def comparison_text(finding: Finding) -> str:
    comparison, names = finding.comparison, finding.comparison.statistic.split(" - ")
    statistic = " − ".join(NAMES.get(name, name) for name in names)
    if comparison.over:
        return f"{statistic} per doubling, {', '.join(f'{factor:g}' for factor in comparison.over.values())}"
    return f"{statistic}, {comparison.of} − {comparison.against}"


def claimed(finding: Finding) -> str:
    if finding.comparison.claim != "equal":
        return finding.comparison.claim
    if finding.margin is None:
        return "equal (margin: a third of the difference in claim 1-scope, not known yet)"
    return f"equal, ± {number(finding.margin, finding.comparison.statistic)}"


def verdict_text(finding: Finding) -> str:
    """The verdict; for an undecided claim also what it would take to support it."""
    comparison, estimate = finding.comparison, finding.estimate
    if finding.is_missing:
        return "not run"
    if finding.judgement is None or estimate is None:
        return finding.verdict
    if finding.verdict != "undecided":
        so_far = " so far" if estimate.n + finding.diverged < finding.planned else ""
        if finding.verdict == "supported" or comparison.claim != "equal":
            return finding.verdict + so_far
        lower = comparison.of if estimate.mean < 0 else comparison.against
        return f"not supported{so_far}: {lower} is lower"
    if estimate.n < LEAST_SEEDS_TO_ESTIMATE:
        return "undecided"
    if finding.seeds_needed is None:
        beyond = "beyond the margin" if comparison.claim == "equal" else "on the other side"
        return f"undecided; the mean is {beyond}"
    is_many = finding.seeds_needed > MOST_SEEDS_NAMED
    needed = f"more than {MOST_SEEDS_NAMED}" if is_many else f"about {finding.seeds_needed}"
    return f"undecided; {needed} seeds would support it"


def _part(claim: Claim) -> str:
    return SCOPE if claim.name.startswith(CLAIMS_ABOUT_SCOPE) else MECHANISMS


def pages(
    name: str, claims: Sequence[Claim], findings: Sequence[Finding], results: Results, figure: Path | None = None
) -> dict[str, str]:
    """The text of each page by its file name: ``name`` has the verdicts, the others the details. ``figure`` shows the
    frontiers and the leaderboard; its path is relative to the pages."""
    files = {RESULTS: name}
    files |= {part: Path(name).with_stem(f"{Path(name).stem}_{part}").name for part in (SCOPE, MECHANISMS, RUNS)}
    addresses = {part: quote(file) for part, file in files.items()}
    links = {claim.name: f"[{claim.name}]({addresses[_part(claim)]}#{claim.name})" for claim in claims}
    lines = {RESULTS: _verdicts(addresses, claims, findings, results, links, figure)}
    for part, head in ((SCOPE, SCOPE_HEAD), (MECHANISMS, MECHANISMS_HEAD)):
        of_part = [claim for claim in claims if _part(claim) == part]
        lines[part] = [head, DETAILS.format(**addresses), *_details(of_part, findings, links)]
    lines[RUNS] = [RUNS_HEAD.format(**addresses), *_frontiers(addresses, results), *_noise(findings)]
    lines[RUNS] += _runs(claims, results)
    return {file: "\n".join(lines[part]).rstrip("\n") + "\n" for part, file in files.items()}


def _linked(text: str, links: Mapping[str, str]) -> str:
    """The text with a link at each name of a claim."""
    return CLAIM_NAME.sub(lambda match: links.get(match[0], match[0]), text)


def _verdicts(
    addresses: Mapping[str, str],
    claims: Sequence[Claim],
    findings: Sequence[Finding],
    results: Results,
    links: Mapping[str, str],
    figure: Path | None,
) -> list[str]:
    primary = [finding for finding in findings if finding.is_primary]
    lines = [HEAD.format(**addresses)]
    for verdict in ("supported", "not supported", "undecided"):
        of_verdict = [links[finding.claim.name] for finding in primary if finding.verdict == verdict]
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
    lines += ["", READING.format(**addresses), "## Quality against balance", ""]
    if figure is not None:
        lines += [
            f"![Loss against MaxVio: the frontiers, and the arms of claim {LEADERBOARD}]({figure.as_posix()})",
            "",
        ]
    for claim in claims:
        if claim.name == LEADERBOARD:
            lines += _leaderboard(claim, links[claim.name], results)
    return [*lines, SOURCES, "", "## Limits", "", _linked(LIMITS, links)]


def arms(claim: Claim, results: Results) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The stored results that have all statistics of a leaderboard, by arm and seed."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for arm in claim.arms:
        stored = {seed: (results.get(claim.job(arm, seed)) or {}).get("result", {}) for seed in claim.all_seeds}
        by_arm[arm] = {
            seed: result
            for seed, result in stored.items()
            if all(result.get(name) is not None for name in LEADERBOARD_STATISTICS)
        }
    return by_arm


def _leaderboard(claim: Claim, link: str, results: Results) -> list[str]:
    """A table of the arms over the seeds that all of them have, lowest loss first."""
    by_arm = {arm: by_seed for arm, by_seed in arms(claim, results).items() if by_seed}
    seeds = set.intersection(*(set(by_seed) for by_seed in by_arm.values())) if by_arm else set()
    if not seeds or len(by_arm) < 2:
        return ["This comparison has no results yet.", ""]
    means = {
        arm: [math.fsum(by_seed[seed][name] for seed in seeds) / len(seeds) for name in LEADERBOARD_STATISTICS]
        for arm, by_seed in by_arm.items()
    }
    lines = [
        f"The arms of claim {claim.name} over the {len(seeds)} seeds that all of them have, sorted by loss.",
        f"The details of {link} say which of these differences stand out from the noise.",
        "",
        "| arm | strategy | loss | MaxVio | domain information, bits |",
        "|---|---|---|---|---|",
    ]
    for arm, values in sorted(means.items(), key=lambda item: item[1]):
        cells = " | ".join(number(value, name) for name, value in zip(LEADERBOARD_STATISTICS, values, strict=True))
        lines.append(f"| {arm} | `{claim.arms[arm]['strategy']}` | {cells} |")
    return [*lines, ""]


def _frontiers(addresses: Mapping[str, str], results: Results) -> list[str]:
    common = next(iter(FRONTIERS.values()))
    lines = [
        "## Frontiers",
        "",
        f"Every mechanism runs over its coefficient or rate, in size {common.size}, with seeds "
        f"{' and '.join(map(str, common.seeds))}. Of the claims, only 5-dilemma uses these seeds.",
        "",
        "Each cell holds loss / MaxVio of the selection text. The picture under",
        f"[Quality against balance]({addresses[RESULTS]}#quality-against-balance) shows the test text.",
        "",
        f"Bold marks the chosen value: the lowest loss among those with a MaxVio of at most {common.most_maxvio:g}. If",
        "there is none, it is the lowest MaxVio. A grid with its best value at an edge was widened there.",
        "",
        "| | strategy | loss / MaxVio of each value |",
        "|---|---|---|",
    ]
    for frontier in FRONTIERS.values():
        cells = ", ".join(_cells(frontier, results)) or "no run yet"
        score_function = " (softmax scores)" if frontier.arm.get("score_function") == "softmax" else ""
        lines.append(f"| {frontier.name} | `{frontier.arm['strategy']}`{score_function} | {cells} |")
    return [*lines, ""]


def _cells(frontier: Frontier, results: Results) -> Iterator[str]:
    chosen = frontier.chosen(results)
    for value in frontier.grid(results):
        point = frontier.point(value, results)
        if point is not None:
            nats, maxvio = point.mean("selection_nats"), point.mean("selection_maxvio")
            cell = f"{nats:.3f} / {maxvio:.3f}" if math.isfinite(nats + maxvio) else "diverged"
            cell = f"{value}: {cell}" if value else cell
            yield f"**{cell}**" if value == chosen and value else cell
    if frontier.at_edge(results):
        yield "still at the edge"


def _noise(findings: Sequence[Finding]) -> list[str]:
    lines = [
        "## Noise and power",
        "",
        "How much does a paired difference vary from seed to seed? The table has its standard deviation, and the",
        "smallest true difference that this many seeds would detect with 80 % power (a single comparison, at 95 %).",
        "",
        "| claim | comparison | seeds | difference | standard deviation over seeds | detectable difference |",
        "|---|---|---|---|---|---|",
    ]
    for finding in findings:
        estimate, name = finding.estimate, finding.comparison.statistic
        if estimate is not None and estimate.n > 1:
            detectable = detectable_effect(estimate.sd, estimate.n)
            cells = " | ".join(number(value, name) for value in (estimate.mean, estimate.sd, detectable))
            lines.append(f"| {finding.claim.name} | {comparison_text(finding)} | {estimate.n} | {cells} |")
    return [*lines, ""]


def _details(claims: Sequence[Claim], findings: Sequence[Finding], links: Mapping[str, str]) -> Iterator[str]:
    """First the notes that several claims have, each once; then a section a claim."""
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
            yield _linked(f"- {', '.join(claim_names)}: {' '.join(sentences)}", links)
        yield ""
    for claim in claims:
        sentences = _sentences(claim)
        note = [sentence for sentence in sentences if len(claims_by_sentence[sentence]) == 1]
        if len(note) < len(sentences):
            note.append(f"See also [{SHARED_NOTES}](#{SHARED_NOTES.lower().replace(' ', '-')}).")
        of_claim = [finding for finding in findings if finding.claim.name == claim.name]
        yield from _section(claim, _linked(" ".join(note), links), of_claim)


def _sentences(claim: Claim) -> list[str]:
    return SENTENCE_END.split(claim.note) if claim.note else []


def _section(claim: Claim, note: str, findings: Sequence[Finding]) -> Iterator[str]:
    yield from (f"## {claim.name}", "", f"{claim.title}.", "", f"Reported ({claim.source}): {claim.paper}.", "")
    if note:
        yield from (note, "")
    yield from ("| comparison | claimed | means of the arms | here | verdict |", "|---|---|---|---|---|")
    for finding in findings:
        statistic = finding.comparison.statistic
        means = ", ".join(f"{arm} {number(mean, statistic)}" for arm, mean in finding.means.items())
        cells = (comparison_text(finding), claimed(finding), means, result_text(finding), verdict_text(finding))
        yield f"| {' | '.join(cells)} |"
    yield from ("", "| arm | options |", "|---|---|")
    yield from (f"| {arm} | {_options(options)} |" for arm, options in claim.arms.items())
    yield ""


def _runs(claims: Sequence[Claim], results: Results) -> list[str]:
    lines = [
        "## Runs",
        "",
        _effort(claims, results),
        "A run that several claims share counts for each of them in the table.",
        "",
        "| claim | size | runs done | minutes of one core | dates |",
        "|---|---|---|---|---|",
    ]
    claims_by_environment: dict[tuple[str, str], list[str]] = {}
    for claim in claims:
        jobs = claim.planned()
        stored = [result for job in jobs if (result := results.get(job)) is not None]
        dates = sorted(result["began"][:10] for result in stored)
        first_and_last = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "none"
        minutes = sum(result["seconds"] for result in stored) / 60
        dtype = results.dtype or claim.dtype
        size = claim.size if dtype is None else f"{claim.size}, `--dtype {dtype}`"
        lines.append(f"| {claim.name} | {size} | {len(stored)} of {len(jobs)} | {minutes:.0f} | {first_and_last} |")
        hardware = dict.fromkeys(result["hardware"] for result in stored)
        versions = dict.fromkeys(
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()) for result in stored
        )
        if stored:
            environment = (" or ".join(hardware), " or ".join(versions))
            claims_by_environment.setdefault(environment, []).append(claim.name)
    lines += ["", "| size | options that its arms share |", "|---|---|"]
    lines += [f"| {name} | {_options(options)} |" for name, options in SIZES.items()]
    if claims_by_environment:
        lines += ["", "| claims | hardware | versions |", "|---|---|---|"]
    for (hardware_used, versions_used), names in claims_by_environment.items():
        of_claims = "all" if len(names) == len(claims) else ", ".join(names)
        lines.append(f"| {of_claims} | {hardware_used} | {versions_used} |")
    return lines


def _options(options: Mapping[str, Any]) -> str:
    """The options as one types them, in Markdown."""
    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            arguments.append(f"{flag} {value}")
    return f"`{' '.join(arguments)}`"


def write(path: Path, claims: Sequence[Claim], findings: Sequence[Finding], results: Results) -> None:
    """Writes the page of verdicts to ``path`` and the others beside it, with the figure if its file exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = FIGURE if (path.parent / FIGURE).exists() else None
    for name, text in pages(path.name, claims, findings, results, figure).items():
        path.with_name(name).write_text(text, encoding="utf-8")
