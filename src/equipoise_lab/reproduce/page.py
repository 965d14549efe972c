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
FIGURE = Path("figures", "claims.png")
MOST_SEEDS_NAMED = 100  # an estimate above it is too uncertain to print
LEAST_SEEDS_TO_ESTIMATE = 3  # with fewer, the spread is too uncertain to say how many seeds are needed
HEAD = """# What the papers claim, at the size of a laptop

Written by `equipoise reproduce all --page docs/results.md` from the results of runs in
[benchmarks/results/claims](../benchmarks/results/claims), one file per run. Do not edit it by hand. With
`--results runs/mine` the command makes all runs again; with `--budget 0` it lists the claims.

The arms of a claim start from the same weights and see the same micro-batches in the same order. A seed changes all of
these together, and differences are taken seed by seed. Brackets hold the 95 % t interval of the mean difference. A
claim is *supported* if the interval lies wholly on its side (for *equal*: inside the margin), *not supported* if the
interval lies wholly on the other side, and *undecided* otherwise. An undecided claim comes with the number of seeds
that would support it if mean and spread stayed the same.

The first row of each claim decides it. These verdicts are corrected for the number of claims (Holm), so an interval may
exclude 0 although its claim is undecided. The other rows are not corrected; each stands alone. Claims share runs, above
all those with the loss over a micro-batch and over the global batch, so their verdicts are not independent.

Loss: mean cross-entropy of the test text, in nats per token. MaxVio: of the test text; 0 is perfectly even. Domain
information: how much the choice of an expert tells about the domain, in bits. Coefficients and rates are those chosen
on the [frontiers](#frontiers), unless an arm has its own.

The model is the default of `equipoise train`: 3 layers of width 128, 32 experts and a shared one, 4 experts per token;
a step has 8 micro-batches of 1,024 tokens, each of one of 8 domains. Size small has 80 steps, standard 200.
Forwards run under bfloat16 autocast, unless a claim says float32.
"""
LIMITS = """These are small models, trained for minutes on the packaged text. A result here need not hold at scale, and
a difference that is undecided here may be clear there.

- **Text.** Each micro-batch holds text of one domain, so the differences between scopes are upper bounds. An interval
  is over seeds (weights, data and domain order together), not over other texts, sizes or learning rates.
- **Tuning.** Coefficients and rates are chosen in short runs with two seeds, so noise may put an arm off its best. A
  number that suits 80 steps need not suit 200, and Loss-Free's rate does not: in the claims with an arm at a third of
  it (4-loss-free, 4-loss-free-same-scope, 5-rules), that arm is far better. It was added after the other results were
  known, and no other mechanism got a second try, so it stands beside the verdicts and does not count in them. All arms
  share a learning rate; an arm that would gain most from another one is at a disadvantage.
- **Changes of the library.** The runs were made over days, while the library changed. A change in rounding moves a loss
  as another seed would, in no particular direction. Pairs of arms from before and after a change are therefore noisier,
  but not biased.
- **Recipe.** Norms, learning rate and length were chosen so that the difference of claim 1-scope is visible at all, on
  seeds 0 to 3, which that claim uses too. Claim 9-recipe tests other recipes.
- **Margin.** The margin of *equal* is a third of the difference in claim 1-scope. This rule was fixed beforehand; the
  number was not, and it is larger than the differences that the papers report."""
SOURCES = """Beyond the balancers of the library: `phi`, phi-balancing (arXiv:2605.15403); `shinka`, a loss found by
program search (ShinkaEvolve, arXiv:2509.19349); `shuffle`, the control of arXiv:2501.11873, Table 2; and expert choice,
Sinkhorn and hash, ways to choose experts without a balancer. For formulas, and where we differ from the papers, see
[balancers.py](../src/equipoise_lab/train/balancers.py), [selection.py](../src/equipoise_lab/train/selection.py)."""


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
        f"The arms of claim {claim.name} over the {len(seeds)} seeds that all of them have, lowest loss first.",
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
        f"Every mechanism over its coefficient or rate, size {common.size}, seeds "
        f"{' and '.join(map(str, common.seeds))} (of the claims, only 5-dilemma uses these).",
        "Bold marks the chosen value: the lowest loss on the selection text among those with a MaxVio there of at most",
        f"{common.most_maxvio:g}; if there is none, the lowest MaxVio. Each cell: loss / MaxVio of the selection text;",
        "the picture shows the test text. A grid with its best value at an edge was widened there.",
        "",
        "| | strategy | |",
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
        "How much a paired difference varies from seed to seed (its standard deviation), and the smallest true",
        "difference that this many seeds would detect with 80 % power (a single comparison, at 95 %).",
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
    lines = [f"## {claim.name}", "", f"{claim.title}. Reported ({claim.source}): {claim.paper}.", ""]
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
        f"`equipoise reproduce {claim.name}`. Arms: {by_name}. Size {claim.size}: {_options(size)}.",
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
            f"{len(stored)} of {len(claim.jobs())} runs, {minutes:.0f} minutes of one core, {' or '.join(hardware)}, "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {' or '.join(versions)}."
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
