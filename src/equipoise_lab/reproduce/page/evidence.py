"""What verdicts rest on: the frontiers, the noise over seeds, and the runs."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from equipoise_lab.analysis import detectable_effect
from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.edition import Edition
from equipoise_lab.reproduce.frontier import Frontier, Point
from equipoise_lab.reproduce.page.environments import all_made_with_line
from equipoise_lab.reproduce.page.wording import comparison_text, ignored_text, number, options_text
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import Finding

__all__ = ["frontiers", "noise", "runs"]


def frontiers(edition: Edition, figure: str, results: Results) -> list[str]:
    """``figure``: the address of the picture of the test text."""
    common = next(iter(edition.frontiers.values()))
    lines = [
        "## Frontiers",
        "",
        f"Every mechanism runs over its coefficient or rate, in size {common.size}, with {_seeds_text(common.seeds)}. "
        f"{edition.page.frontier_seeds}".rstrip(),
        "",
        "Each cell holds loss / MaxVio of the selection text. The picture under",
        f"[Quality against balance]({figure}) shows the test text.",
        "",
        f"Bold marks the chosen value: the lowest loss among those with a MaxVio of at most {common.most_maxvio:g}. If",
        "there is none, it is the lowest MaxVio. *Refused* values have a lower loss, and a MaxVio above the limit.",
        "A grid with its best value at an edge was widened there.",
        "",
        "| | options | loss / MaxVio of each value |",
        "|---|---|---|",
    ]
    for frontier in edition.frontiers.values():
        cells = ", ".join(_cells(frontier, results)) or "no run yet"
        lines.append(f"| {frontier.name} | {options_text(frontier.arm)} | {cells} |")
    made_with = all_made_with_line(
        "All runs of the frontiers",
        "**The runs of the frontiers are not alike:**",
        {frontier.name: frontier.jobs(results) for frontier in edition.frontiers.values()},
        results,
    )
    return [*lines, "", *_learning_rates(edition, results), *((made_with, "") if made_with else ())]


def _seeds_text(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {' and '.join(map(str, seeds))}"


def _learning_rates(edition: Edition, results: Results) -> Iterator[str]:
    """The second stage of the frontiers that have one."""
    of_stage = [frontier for frontier in edition.frontiers.values() if frontier.learning_rates is not None]
    if not of_stage:
        return
    yield from (
        "Then these run at their chosen value with several learning rates, and the same rule chooses one.",
        "",
        "| | options | loss / MaxVio of each learning rate |",
        "|---|---|---|",
    )
    for frontier in of_stage:
        value = frontier.value(results)
        options = frontier.arm if value is None else frontier.options(value)
        cells = ", ".join(_learning_rate_cells(frontier, results)) or "no run yet"
        yield f"| {frontier.name} | {options_text(options)} | {cells} |"
    yield ""


def _cells(frontier: Frontier, results: Results) -> Iterator[str]:
    chosen, refused = frontier.value(results), frontier.refused_for_balance(results)
    for value in frontier.grid(results):
        for cell in _cell(frontier.point(value, results), value == chosen):
            yield f"{cell} (refused)" if value in refused else cell
    if frontier.at_edge(results):
        yield "still at the edge"


def _learning_rate_cells(frontier: Frontier, results: Results) -> Iterator[str]:
    chosen = frontier.learning_rate(results)
    for learning_rate in frontier.learning_rate_grid(results):
        yield from _cell(frontier.learning_rate_point(learning_rate, results), learning_rate == chosen)
    if frontier.learning_rate_at_edge(results):
        yield "still at the edge"


def _cell(point: Point | None, is_chosen: bool) -> Iterator[str]:
    if point is not None:
        nats, maxvio = point.mean("selection_nats"), point.mean("selection_maxvio")
        cell = f"{nats:.3f} / {maxvio:.3f}" if math.isfinite(nats + maxvio) else "diverged"
        cell = f"{point.value}: {cell}" if point.value else cell
        yield f"**{cell}**" if is_chosen and point.value else cell


def noise(findings: Sequence[Finding]) -> list[str]:
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


def runs(edition: Edition, claims: Sequence[Claim], results: Results) -> list[str]:
    lines = [
        "## Runs",
        "",
        _effort(edition, claims, results),
        "A run that several claims share counts for each of them in the table.",
        *filter(None, [ignored_text(results.num_results_of_other_recipes, edition.name, edition.recipe)]),
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
    lines += [f"| {name} | {options_text(options)} |" for name, options in edition.sizes.items()]
    if claims_by_environment:
        lines += ["", "| claims | hardware | versions |", "|---|---|---|"]
    for (hardware_used, versions_used), names in claims_by_environment.items():
        of_claims = "all" if len(names) == len(claims) else ", ".join(names)
        lines.append(f"| {of_claims} | {hardware_used} | {versions_used} |")
    return lines


def _effort(edition: Edition, claims: Sequence[Claim], results: Results) -> str:
    """How long the runs of all claims and frontiers took; shared runs count once."""
    jobs = [job for claim in claims for job in claim.planned()]
    jobs += [job for frontier in edition.frontiers.values() for job in frontier.jobs(results)]
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
