"""Numbers, comparisons and verdicts in the words of the pages and of the command line."""

from collections.abc import Mapping
from typing import Any

from equipoise_lab.reproduce.verdict import POWER, Finding

__all__ = [
    "claimed",
    "comparison_text",
    "ignored_text",
    "number",
    "options_text",
    "power_text",
    "result_text",
    "verdict_text",
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
MOST_SEEDS_NAMED = 100  # an estimate above it is too uncertain to print
LEAST_SEEDS_TO_ESTIMATE = 3  # with fewer, the spread is too uncertain to say how many seeds are needed


def number(value: float, statistic: str) -> str:
    return f"{value:.{DIGITS.get(statistic, 3)}f}".replace("-", "−")


def result_text(finding: Finding) -> str:
    """The difference or slope, with its interval and number of seeds."""
    estimate = finding.estimate
    if estimate is None:
        return f"{finding.diverged} of {finding.planned} seeds diverged" if finding.diverged else "no run yet"
    name = finding.comparison.statistic
    if estimate.n < 2:
        return f"{number(estimate.mean, name)} (one seed{f', {finding.diverged} diverged' if finding.diverged else ''})"
    low, high = (number(end, name) for end in estimate.interval)
    planned = finding.planned
    seeds = f"{estimate.n} seeds" if estimate.n == planned else f"{estimate.n} of {planned} seeds"
    if finding.diverged:
        seeds += f", {finding.diverged} diverged"
    return f"{number(estimate.mean, name)} [{low}, {high}], {seeds}"


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


def verdict_text(finding: Finding, is_short: bool = False) -> str:
    """The verdict, with "so far" while seeds are missing. In full, for an undecided claim also why it is, or what it
    would take to support it."""
    comparison, estimate = finding.comparison, finding.estimate
    if finding.is_missing:
        return "not run"
    if finding.diverged:
        return "undecided" if is_short else "undecided, as runs diverged"
    if finding.judgement is None or estimate is None:
        return finding.verdict
    if finding.verdict != "undecided":
        so_far = "" if finding.is_finished else " so far"
        if is_short or finding.verdict == "supported" or comparison.claim != "equal":
            return finding.verdict + so_far
        lower = comparison.of if estimate.mean < 0 else comparison.against
        return f"not supported{so_far}: {lower} is lower"
    if is_short or estimate.n < LEAST_SEEDS_TO_ESTIMATE:
        return "undecided" if finding.is_finished or not is_short else "undecided so far"
    if finding.seeds_needed is None:
        beyond = "beyond the margin" if comparison.claim == "equal" else "on the other side"
        return f"undecided; the mean is {beyond}"
    is_many = finding.seeds_needed > MOST_SEEDS_NAMED
    needed = f"more than {MOST_SEEDS_NAMED}" if is_many else f"about {finding.seeds_needed}"
    return f"undecided; {needed} seeds would support it"


def power_text(finding: Finding) -> str:
    """What power the seeds of the last look have for the effect that they are planned for; "" without one."""
    comparison, estimate, planned = finding.comparison, finding.estimate, finding.planned_at_most
    if comparison.effect is None:
        return ""
    compared = comparison_text(finding)
    start = (
        f"{compared[0].upper()}{compared[1:]}: if the true value is {number(comparison.effect, comparison.statistic)},"
    )
    if finding.power is None or estimate is None or estimate.n < LEAST_SEEDS_TO_ESTIMATE:
        return f"{start} the power of {planned} seeds is not known yet."
    text = f"{start} and the spread that of these {estimate.n} seeds, {planned} seeds support the claim with"
    text += f" {_percent(finding.power)} power"
    if finding.power >= POWER:
        return f"{text}."
    if finding.seeds_for_effect is None:
        return f"{text}. {_percent(POWER)} is out of reach: this is not what the claim says."
    if finding.seeds_for_effect > MOST_SEEDS_NAMED:
        return f"{text}. {_percent(POWER)} is out of reach: it takes more than {MOST_SEEDS_NAMED} seeds."
    return f"{text}; {_percent(POWER)} takes about {finding.seeds_for_effect} seeds."


def _percent(share: float) -> str:
    return "more than 99 %" if share > 0.99 else "less than 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def ignored_text(number_of_results: int, edition: str, recipe: int) -> str:
    """A sentence on results of another version of the recipe; "" if there is none."""
    if not number_of_results:
        return ""
    are = "1 stored result is" if number_of_results == 1 else f"{number_of_results} stored results are"
    return f"{are} ignored: of another version of the recipe than {recipe}, that of the {edition} edition."


def options_text(options: Mapping[str, Any]) -> str:
    """The options as one types them, in Markdown; first what an arm still needs from a frontier."""
    options = dict(options)
    frontier = options.pop("frontier", None)
    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            arguments.append(f"{flag} {value}")
    typed = f"`{' '.join(arguments)}`" if arguments else ""
    return typed if frontier is None else f"what frontier {frontier} will choose {typed}".rstrip()
