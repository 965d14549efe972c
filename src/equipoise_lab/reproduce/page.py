"""findings -> a page in Markdown: claim by claim what is reported, what came out here, and how to get it again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise_lab.analysis import detectable_effect
from equipoise_lab.reproduce.claim import SIZES, Claim
from equipoise_lab.reproduce.frontier import FRONTIERS, Frontier
from equipoise_lab.reproduce.runs import Results
from equipoise_lab.reproduce.verdict import Finding

__all__ = ["FIGURE", "LEADERBOARD", "arms", "concludes", "number", "page", "says", "summary", "write"]

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
LEADERBOARD = "8-leaderboard"  # the claim whose arms are all set side by side
FIGURES = ("val_nats", "maxvio_global", "domain_information_bits")  # of a leaderboard
FIGURE = Path("figures", "claims.png")
MANY = 100  # seeds; above it the number says little
LEAST = 3  # seeds; below it their spread says nothing of how many would do
HEAD = """# What the papers claim, at the size of a laptop

Written by `equipoise reproduce all --page docs/results.md` from the results of runs in
[benchmarks/results/claims](../benchmarks/results/claims), one file a run. Do not edit it by hand. With
`--results runs/mine` it makes all runs again; `--budget 0` lists the claims.

Arms of a claim start from the same weights and see the same micro-batches in the same order; a seed changes all of them
together, and differences are taken seed by seed. In brackets: the 95 % t interval of their mean. *Supported*: it lies
wholly on the claim's side (for *equal*: inside the margin); *not supported*: wholly on the other; else *undecided*,
with the seeds that would support it by what is seen. The first row of each claim decides it. These verdicts are
corrected for the number of claims (Holm), so that an interval may exclude 0 and its claim be undecided; the other rows
are not corrected, and each stands alone. Claims share runs, above all those of the losses over a micro-batch and over
the global batch, so their verdicts are not independent of each other.

Loss: mean cross-entropy of the test text in nats a token. MaxVio: of the test text, 0 is even. Domain information: what
the choice of an expert tells about the domain, in bits. Coefficients and rates are those chosen on the
[frontiers](#frontiers), unless an arm has its own.

The model is the default of `equipoise train`: 3 layers of width 128, 32 experts and a shared one, 4 experts a token;
a step has 8 micro-batches of 1,024 tokens, each of one of 8 domains. Size small has 80 steps, standard 200.
Forwards are under bfloat16 autocast, unless a claim says float32.
"""
LIMITS = """These are small models, trained for minutes on the packaged text. What holds here need not hold at scale,
and what is undecided here may be plain there. Micro-batches hold text of one domain each, so the differences between
scopes are upper bounds. An interval is of the seeds (weights, data and domain order together), not of other texts,
sizes or learning rates. Coefficients and rates are chosen in short runs with two seeds, so an arm may be off its best
by their noise, and a number that suits 80 steps need not suit 200. Loss-Free's rate does not: in the claims that have
an arm at a third of it (4-loss-free, 4-loss-free-same-scope, 5-rules), that arm is far better. It was added after the
others had been seen, and no other mechanism got a second try, so it stands beside the verdicts and not in them. All
arms share a learning rate: one that would gain most by another loses here. The runs were made over days, while the
library changed: a change that rounds differently moves a loss as another seed would, in no direction, so pairs of
arms from before and after are noisier, not biased. The recipe (norms, learning rate, length) was chosen so that the
difference of claim 1-scope is seen at all, on seeds 0 to 3, which that claim has too; claim 9-recipe has other
recipes. The margin of *equal* is a third of what claim 1-scope finds: the rule was fixed beforehand, the number was
not, and it is larger than the differences that the papers report."""
SOURCES = """Besides the balancers of the library: `phi`, phi-balancing (arXiv:2605.15403); `shinka`, the loss that a
program search found (ShinkaEvolve, arXiv:2509.19349); `shuffle`, the control of arXiv:2501.11873, Table 2; expert
choice, Sinkhorn and hash, ways to choose without a balancer. Formulas and where we differ:
[balancers.py](../src/equipoise_lab/train/balancers.py), [selection.py](../src/equipoise_lab/train/selection.py)."""


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
    planned = finding.planned
    seeds = f"{estimate.n} seeds" if estimate.n == planned else f"{estimate.n} of {planned} seeds"
    if finding.diverged:
        seeds += f", {finding.diverged} diverged"
    return f"{number(estimate.mean, name)} [{low}, {high}], {seeds}"


def _effort(claims: Sequence[Claim], results: Results) -> str:
    """What all claims and frontiers took; runs that several of them share count once."""
    jobs = [job for claim in claims for job in claim.planned()]
    jobs += [job for frontier in FRONTIERS.values() for job in frontier.jobs(results)]
    jobs = list(dict.fromkeys(jobs))
    took: dict[Any, list[float]] = {}  # by steps and precision
    for job in jobs:
        if (stored := results.get(job)) is not None:
            options = stored["options"]
            took.setdefault((options.get("steps"), options.get("dtype")), []).append(stored["seconds"])
    hours = sum(map(sum, took.values())) / 3600
    quickest = sum(len(seconds) * min(seconds) for seconds in took.values()) / 3600
    return (
        f"All claims and frontiers: {sum(map(len, took.values()))} of {len(jobs)} runs, whose steps took {hours:.1f} "
        f"hours of one core; {quickest:.1f} at the pace of the quickest run of as many steps and the same precision."
    )


def summary(finding: Finding, page: str = "") -> tuple[str, str, str]:
    """The claim, linked to its section of ``page``; what came out; the verdict."""
    claim = finding.claim
    return f"[{claim.title}]({page}#{claim.name})", f"{named(finding)}: {says(finding)}", concludes(finding)


def named(finding: Finding) -> str:
    """The comparison in words."""
    comparison, names = finding.comparison, finding.comparison.statistic.split(" - ")
    statistic = " − ".join(NAMES.get(name, name) for name in names)
    if comparison.over:
        return f"{statistic} by doubling, {', '.join(f'{factor:g}' for factor in comparison.over.values())}"
    return f"{statistic}, {comparison.of} − {comparison.against}"


def claimed(finding: Finding) -> str:
    if finding.comparison.claim != "equal":
        return finding.comparison.claim
    if finding.margin is None:
        return "equal (margin: a third of claim 1-scope, not known yet)"
    return f"equal, ± {number(finding.margin, finding.comparison.statistic)}"


def concludes(finding: Finding) -> str:
    """The verdict; where it is open, what would support it."""
    comparison, estimate = finding.comparison, finding.estimate
    if finding.judgement is None or estimate is None:
        return finding.verdict
    if finding.verdict != "undecided":
        so_far = " so far" if estimate.n + finding.diverged < finding.planned else ""
        if finding.verdict == "supported" or comparison.claim != "equal":
            return finding.verdict + so_far
        lower = comparison.of if estimate.mean < 0 else comparison.against
        return f"not supported{so_far}: {lower} is lower"
    if estimate.n < LEAST:
        return "undecided"
    if finding.seeds_needed is None:
        beyond = "beyond the margin" if comparison.claim == "equal" else "on the other side"
        return f"undecided; the mean is {beyond}"
    needed = f"about {finding.seeds_needed}" if finding.seeds_needed <= MANY else f"more than {MANY}"
    return f"undecided; {needed} seeds would support it"


def page(claims: Sequence[Claim], found: Sequence[Finding], results: Results, figure: Path | None = None) -> str:
    """The page; ``figure`` is a picture of the frontiers and the leaderboard, as the page names it."""
    primary = [finding for finding in found if finding.is_primary]
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
            lines += _who_won(claim, results)
    lines += [SOURCES, "", "## Limits", "", LIMITS, ""]
    lines += _frontiers(results)
    lines += _noise(found)
    for claim in claims:
        lines += _section(claim, [finding for finding in found if finding.claim.name == claim.name], results)
    return "\n".join(lines) + "\n"


def arms(claim: Claim, results: Results) -> dict[str, dict[int, Mapping[str, Any]]]:
    """By arm and seed, the results that are there and have the figures of a leaderboard."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for arm in claim.arms:
        stored = {seed: (results.get(claim.job(arm, seed)) or {}).get("result", {}) for seed in claim.all_seeds}
        found[arm] = {
            seed: each for seed, each in stored.items() if all(each.get(name) is not None for name in FIGURES)
        }
    return found


def _who_won(claim: Claim, results: Results) -> list[str]:
    """The arms over the seeds that all of them have, the lowest loss first."""
    by_arm = {arm: by_seed for arm, by_seed in arms(claim, results).items() if by_seed}
    seeds = set.intersection(*(set(by_seed) for by_seed in by_arm.values())) if by_arm else set()
    if not seeds or len(by_arm) < 2:
        return ["The runs of this comparison are not there yet.", ""]
    means = {
        arm: [math.fsum(by_seed[seed][name] for seed in seeds) / len(seeds) for name in FIGURES]
        for arm, by_seed in by_arm.items()
    }
    lines = [
        f"The arms of claim {claim.name} over the {len(seeds)} seeds that all of them have, the lowest loss first.",
        "Which of these differences stand out from the noise its own section says.",
        "",
        "| arm | strategy | loss | MaxVio | domain information, bits |",
        "|---|---|---|---|---|",
    ]
    for arm, values in sorted(means.items(), key=lambda item: item[1]):
        shown = " | ".join(number(value, name) for name, value in zip(FIGURES, values, strict=True))
        lines.append(f"| {arm} | `{claim.arms[arm]['strategy']}` | {shown} |")
    return [*lines, ""]


def _frontiers(results: Results) -> list[str]:
    common = next(iter(FRONTIERS.values()))
    lines = [
        "## Frontiers",
        "",
        f"Every mechanism over its coefficient or rate, size {common.size}, seeds",
        f"{' and '.join(map(str, common.seeds))}, which of the claims only 5-dilemma has. Chosen (bold): the lowest",
        f"loss on the selection text among those with a MaxVio there of at most {common.most_maxvio:g}; where none is,",
        "the lowest MaxVio. Each cell: loss / MaxVio of the selection text; the picture shows the test text. A grid",
        "whose best value lies at its edge was widened.",
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
            shown = f"{nats:.3f} / {maxvio:.3f}" if math.isfinite(nats + maxvio) else "diverged"
            shown = f"{value}: {shown}" if value else shown
            yield f"**{shown}**" if value == chosen and value else shown
    if frontier.at_edge(results):
        yield "still at the edge"


def _noise(found: Sequence[Finding]) -> list[str]:
    lines = [
        "## Noise and power",
        "",
        "How far seeds alone move a paired difference, and the smallest true one that as many seeds would find with",
        "80 % power (alone, at 95 %).",
        "",
        "| claim | comparison | seeds | difference | its spread over seeds | would be found |",
        "|---|---|---|---|---|---|",
    ]
    for finding in found:
        estimate, name = finding.estimate, finding.comparison.statistic
        if estimate is not None and estimate.n > 1:
            least = detectable_effect(estimate.sd, estimate.n)
            figures = " | ".join(number(value, name) for value in (estimate.mean, estimate.sd, least))
            lines.append(f"| {finding.claim.name} | {named(finding)} | {estimate.n} | {figures} |")
    return [*lines, ""]


def _section(claim: Claim, found: Sequence[Finding], results: Results) -> list[str]:
    lines = [f"## {claim.name}", "", f"{claim.title}. Reported ({claim.source}): {claim.paper}.", ""]
    if claim.note:
        lines += [claim.note, ""]
    lines += ["| comparison | claimed | means of the arms | here | verdict |", "|---|---|---|---|---|"]
    for finding in found:
        statistic = finding.comparison.statistic
        means = ", ".join(f"{arm} {number(mean, statistic)}" for arm, mean in finding.means.items())
        lines.append(f"| {named(finding)} | {claimed(finding)} | {means} | {says(finding)} | {concludes(finding)} |")
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
    """As the command line takes them."""
    found = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found.append(f"{flag} {value}")
    return f"`{' '.join(found)}`"


def write(path: Path, claims: Sequence[Claim], found: Sequence[Finding], results: Results) -> None:
    """Writes the page to ``path``, with the figure that lies beside it, if one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = FIGURE if (path.parent / FIGURE).exists() else None
    path.write_text(page(claims, found, results, there), encoding="utf-8")
