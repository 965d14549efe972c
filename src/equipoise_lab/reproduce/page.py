"""Findings -> a page in Markdown: for each claim what the paper reports, the result here, and how to reproduce it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    "page",
    "result_text",
    "summary",
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
HEAD = """# What the papers claim, at the size of a laptop

This page says what our small runs show of the claims of papers. It has a verdict for each claim, the differences
behind it, and the limits of this evidence. [How claims are tested](claims.md) has the rules.

`equipoise reproduce all --page docs/evidence/results.md` writes it from
[benchmarks/results/claims](../../benchmarks/results/claims), one file per run. Do not edit it by hand. With
`--results runs/mine` the command makes all runs again. With `--budget 0` it lists the claims.

## How to read it

- **Differences.** The arms of a claim start from the same weights and see the same micro-batches in the same order. A
  seed changes all of these together. Differences are taken seed by seed. Brackets hold the 95 % t interval of the mean
  difference.
- **Verdicts.** A claim is *supported* if the interval lies wholly on its side. For *equal* that means inside the
  margin. It is *not supported* if the interval lies wholly on the other side. Otherwise it is *undecided*. Then the
  page says how many seeds would support it if mean and spread stayed the same.
- **First rows.** The first row of a claim decides it. These verdicts are corrected for the number of claims (Holm). So
  an interval may exclude 0 although its claim is undecided.
- **Other rows.** They are not corrected; each stands alone.
- **Shared runs.** Claims share runs, above all those with the loss over a micro-batch and over the global batch. So
  their verdicts are not independent.
- **Loss** is the mean cross-entropy of the test text, in nats per token.
- **MaxVio** is that of the test text; 0 is perfectly even.
- **Domain information** says how much the choice of an expert tells about the domain, in bits.
- **Coefficients and rates** are those chosen on the [frontiers](#frontiers), unless an arm has its own.
- **Model.** It is the default of `equipoise train`.
  It has 3 layers of width 128, 32 experts and a shared one, 4 experts per token.
  A step has 8 micro-batches of 1,024 tokens, each of one of 8 domains.
  Size small has 80 steps, standard 200.
  Forwards run under bfloat16 autocast, unless a claim says float32.

## Verdicts
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


def summary(finding: Finding, page: str = "") -> tuple[str, str, str]:
    """The claim with a link to its section of ``page``, the result, the verdict."""
    claim = finding.claim
    return (
        f"[{claim.title}]({page}#{claim.name})",
        f"{comparison_text(finding)}: {result_text(finding)}",
        verdict_text(finding),
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


def page(claims: Sequence[Claim], findings: Sequence[Finding], results: Results, figure: Path | None = None) -> str:
    """The page. ``figure`` shows the frontiers and the leaderboard; its path is relative to the page."""
    primary = [finding for finding in findings if finding.is_primary]
    counts = {verdict: sum(f.verdict == verdict for f in primary) for verdict in ("supported", "not supported")}
    lines = [
        HEAD,
        f"Claims: {len(primary)}. Supported: {counts['supported']}; not supported: {counts['not supported']}; "
        f"undecided: {len(primary) - sum(counts.values())}.",
        _effort(claims, results),
        "",
        "| claim | reported | here | verdict |",
        "|---|---|---|---|",
    ]
    for finding in primary:
        claim = finding.claim
        title, here, verdict = summary(finding)
        lines.append(f"| {title} | {claim.paper} ({claim.source}) | {here} | {verdict} |")
    lines += ["", "## Quality against balance", ""]
    if figure is not None:
        lines += [
            f"![Loss against MaxVio: the frontiers, and the arms of claim {LEADERBOARD}]({figure.as_posix()})",
            "",
        ]
    for claim in claims:
        if claim.name == LEADERBOARD:
            lines += _leaderboard(claim, results)
    lines += [SOURCES, "", "## Limits", "", LIMITS, ""]
    lines += _frontiers(results)
    lines += _noise(findings)
    for claim in claims:
        lines += _section(claim, [finding for finding in findings if finding.claim.name == claim.name], results)
    return "\n".join(lines) + "\n"


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


def _leaderboard(claim: Claim, results: Results) -> list[str]:
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
        f"The section of [{claim.name}](#{claim.name}) says which of these differences stand out from the noise.",
        "",
        "| arm | strategy | loss | MaxVio | domain information, bits |",
        "|---|---|---|---|---|",
    ]
    for arm, values in sorted(means.items(), key=lambda item: item[1]):
        cells = " | ".join(number(value, name) for name, value in zip(LEADERBOARD_STATISTICS, values, strict=True))
        lines.append(f"| {arm} | `{claim.arms[arm]['strategy']}` | {cells} |")
    return [*lines, ""]


def _frontiers(results: Results) -> list[str]:
    common = next(iter(FRONTIERS.values()))
    lines = [
        "## Frontiers",
        "",
        f"Every mechanism runs over its coefficient or rate, in size {common.size}, with seeds "
        f"{' and '.join(map(str, common.seeds))}. Of the claims, only 5-dilemma uses these seeds.",
        "",
        "Each cell holds loss / MaxVio of the selection text. The picture shows the test text. Bold marks the chosen",
        f"value: the lowest loss among those with a MaxVio of at most {common.most_maxvio:g}. If there is none, it is",
        "the lowest MaxVio. A grid with its best value at an edge was widened there.",
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


def _section(claim: Claim, findings: Sequence[Finding], results: Results) -> list[str]:
    lines = [f"## {claim.name}", "", f"{claim.title}.", "", f"Reported ({claim.source}): {claim.paper}.", ""]
    if claim.note:
        lines += [claim.note, ""]
    lines += ["| comparison | claimed | means of the arms | here | verdict |", "|---|---|---|---|---|"]
    for finding in findings:
        statistic = finding.comparison.statistic
        means = ", ".join(f"{arm} {number(mean, statistic)}" for arm, mean in finding.means.items())
        cells = (comparison_text(finding), claimed(finding), means, result_text(finding), verdict_text(finding))
        lines.append(f"| {' | '.join(cells)} |")
    dtype = results.dtype or claim.dtype
    size = SIZES[claim.size] | ({} if dtype is None else {"dtype": dtype})
    by_name = "; ".join(f"{arm}: {_options(options)}" for arm, options in claim.arms.items())
    lines += [
        "",
        f"- Command: `equipoise reproduce {claim.name}`.",
        f"- Arms: {by_name}.",
        f"- Size {claim.size}: {_options(size)}.",
    ]
    stored = [result for job in claim.jobs() if (result := results.get(job)) is not None]
    if stored:
        dates = sorted(result["began"][:10] for result in stored)
        minutes = sum(result["seconds"] for result in stored) / 60
        hardware = dict.fromkeys(result["hardware"] for result in stored)
        versions = dict.fromkeys(
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()) for result in stored
        )
        lines += [
            f"- Done: {len(stored)} of {len(claim.jobs())} runs, {minutes:.0f} minutes of one core, "
            f"{' or '.join(hardware)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
            f"- Versions: {' or '.join(versions)}.",
        ]
    return [*lines, ""]


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
    """Writes the page to ``path``, with the figure if its file exists beside the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = FIGURE if (path.parent / FIGURE).exists() else None
    path.write_text(page(claims, findings, results, figure), encoding="utf-8")
