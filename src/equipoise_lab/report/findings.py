"""The findings of finished runs in sentences: who won, by how much, and whether the lead is more than chance."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from equipoise_lab.analysis import Hypothesis, Judgement, judge, judge_family, paired_differences, seeds_needed
from equipoise_lab.analysis.summary import number, summary_rows
from equipoise_lab.records import Run

__all__ = ["Comparison", "Findings", "compare_runs"]

COMPARED = ("val_nats", "maxvio_global", "domain_information_bits")


@dataclass(frozen=True)
class Comparison:
    """Another strategy against the best one. Differences (other - best) are paired by seed."""

    strategy: str
    nats: Judgement  # claim: the other loss is higher
    maxvio: Judgement  # claim: the MaxVio differs in the observed direction

    @property
    def is_beaten(self) -> bool:
        return self.nats.verdict == "supported"

    @property
    def verdict(self) -> str:
        if self.nats.estimate.n == 1:
            return "one seed: undecided"
        return "significant" if self.is_beaten else "undecided"


@dataclass(frozen=True)
class Findings:
    """A short ``headline``, further ``details``, and the ``best`` strategy with the others compared to it."""

    headline: Markup
    details: list[Markup]
    best: str | None = None
    comparisons: tuple[Comparison, ...] = ()


def compare_runs(runs: Sequence[Run]) -> Findings:
    """Compares the strategies of finished runs. Strategy names are escaped.

    The best strategy has the lowest mean loss on test text, over the seeds that all strategies share. Its differences
    to the others are paired by seed and judged as one family (Holm, 5 %). A difference is *significant* if its interval
    excludes 0 and it survives Holm's adjustment.
    """
    rows = summary_rows(runs)
    if not rows:
        return Findings(Markup("No run has finished yet, so there is nothing to compare."), [])
    finite_rows = [row for row in rows if all(math.isfinite(row[key]) for key in COMPARED)]
    details = [
        Markup(
            "{} <strong>diverged</strong>: its loss, balance or domain information is not finite. It is left out of "
            "the comparison."
        ).format(_code(row["strategy"]))
        for row in rows
        if row not in finite_rows
    ]
    if not finite_rows:
        return Findings(Markup("Every finished run diverged."), details)
    if len(finite_rows) == 1:
        headline = Markup("Only one strategy, {}, has results, so there is nothing to compare it with.").format(
            _code(finite_rows[0]["strategy"])
        )
        return Findings(headline, [*details, _balance(finite_rows), *_dead_experts(finite_rows, runs)])
    compared, unrelated = _split_by_common_seed(finite_rows)
    seeds = set.intersection(*(set(row["seeds"]) for row in compared))
    compared = _restrict_to_seeds(compared, seeds, runs)
    if unrelated:
        details.append(
            Markup("<strong>Left out</strong> of the comparison: {}. No seed is shared with the others.").format(
                _join_names([row["strategy"] for row in unrelated])
            )
        )
    best = min(compared, key=lambda row: row["val_nats"])
    comparisons = _compare_with_best(best, [row for row in compared if row is not best], runs)
    strategies = {row["strategy"] for row in compared}
    if seeds and any(set(row["seeds"]) != seeds for row in rows if row["strategy"] in strategies):
        details.append(
            Markup(
                "<strong>Seeds.</strong> Not every strategy has every seed. The comparison uses the seeds that all "
                "share: {}."
            ).format(", ".join(map(str, sorted(seeds))))
        )
    quality = [_quality(best, comparisons)]
    others = [_balance(compared), _specialisation(compared, len(runs[0].config["domains"]))]
    ordered = others + quality if _is_one_seed(comparisons) else quality + others
    details += [*ordered, *_dead_experts(compared, runs)]
    headline = _headline(best, compared, comparisons, is_complete=not unrelated)
    return Findings(headline, details, best["strategy"], tuple(comparisons))


def _split_by_common_seed(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that have the most frequent seed, and the other rows. All rows come first if no two of them share a seed."""
    frequency = Counter(seed for row in rows for seed in row["seeds"])
    common_seed = min(frequency, key=lambda seed: (-frequency[seed], seed))
    having = [row for row in rows if common_seed in row["seeds"]]
    return (having, [row for row in rows if row not in having]) if len(having) > 1 else (rows, [])


def _restrict_to_seeds(rows: Sequence[Mapping[str, Any]], seeds: set[int], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows, computed again from runs with these seeds only. Unchanged if ``seeds`` is empty."""
    if not seeds:
        return [dict(row) for row in rows]
    strategies = {row["strategy"] for row in rows}
    return summary_rows(run for run in runs if run.config["seed"] in seeds and run.config["strategy"] in strategies)


def _compare_with_best(
    best: Mapping[str, Any], others: Sequence[Mapping[str, Any]], runs: Sequence[Run]
) -> list[Comparison]:
    """The nearest strategy first."""
    values: dict[str, dict[str, dict[int, float]]] = {}  # by strategy, key and seed
    for run in runs:
        if run.complete:
            for key in ("val_nats", "maxvio_global"):
                values.setdefault(run.config["strategy"], {}).setdefault(key, {})[run.config["seed"]] = run.result[key]
    best_values = values[best["strategy"]]
    nats: dict[str, Judgement] = {}
    maxvio: dict[str, Judgement] = {}
    for row in others:
        strategy = row["strategy"]
        other_values = values[strategy]
        if not best_values["val_nats"].keys() & other_values["val_nats"].keys():
            continue  # no seed in common
        nats[strategy] = judge(
            paired_differences(other_values["val_nats"], best_values["val_nats"], intersect=True), Hypothesis("higher")
        )
        difference = paired_differences(other_values["maxvio_global"], best_values["maxvio_global"], intersect=True)
        maxvio[strategy] = judge(difference, Hypothesis("higher" if difference.mean > 0 else "lower"))
    if not nats:
        return []
    nats, maxvio = judge_family(nats), judge_family(maxvio)
    comparisons = [Comparison(strategy, nats[strategy], maxvio[strategy]) for strategy in nats]
    return sorted(comparisons, key=lambda comparison: comparison.nats.estimate.mean)


def _code(strategy: str) -> Markup:
    return Markup("<code>{}</code>").format(strategy)


def _join_names(strategies: Sequence[str]) -> Markup:
    names = [_code(strategy) for strategy in strategies]
    return names[0] if len(names) == 1 else Markup("{} and {}").format(Markup(", ").join(names[:-1]), names[-1])


def _is_one_seed(comparisons: Sequence[Comparison]) -> bool:
    return bool(comparisons) and all(comparison.nats.estimate.n == 1 for comparison in comparisons)


def _headline(
    best: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Comparison],
    *,
    is_complete: bool,
) -> Markup:
    """``is_complete``: whether every strategy is compared."""
    if _is_one_seed(comparisons):
        return _headline_of_one_seed(rows)
    name = _code(best["strategy"])
    beaten = [comparison.strategy for comparison in comparisons if comparison.is_beaten]
    unbeaten = [comparison.strategy for comparison in comparisons if not comparison.is_beaten]
    if not comparisons:
        text = Markup(
            "{} has the lowest loss, but no other strategy ran on the same seeds. Nothing is compared."
        ).format(name)
    elif not unbeaten:
        text = Markup("{} won: its loss is significantly lower than with {}.").format(
            name, "every other strategy" if len(beaten) > 1 and is_complete else _join_names(beaten)
        )
    elif beaten:
        text = Markup(
            "{} has the lowest loss. It is significantly lower than with {}; the lead over {} may be chance."
        ).format(name, _join_names(beaten), _join_names(unbeaten))
    else:
        text = Markup("No strategy won: {} has the lowest loss, but its lead may be chance.").format(name)
    most_even = min(rows, key=lambda row: row["maxvio_global"])
    if most_even is best:
        return text + Markup(" Its load is also the most even.")
    return text + Markup(" {} has the most even load: MaxVio {}, against {} with {}.").format(
        _code(most_even["strategy"]), number(most_even["maxvio_global"], 3), number(best["maxvio_global"], 3), name
    )


def _least_and_most(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return min(rows, key=lambda row: row[key]), max(rows, key=lambda row: row[key])


def _headline_of_one_seed(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Balance and specialisation lead: they differ by far more than between seeds, the loss does not."""
    even, uneven = _least_and_most(rows, "maxvio_global")
    special = max(rows, key=lambda row: row["domain_information_bits"])
    losses = [row["val_nats"] for row in rows]
    return Markup(
        "{} has the most even load: MaxVio {}, against {} with {}. Experts tell most about a token's domain under {}: "
        "{} bits. <strong>Loss is undecided</strong>: one seed cannot tell {} from {} nats."
    ).format(
        _code(even["strategy"]),
        number(even["maxvio_global"], 2),
        number(uneven["maxvio_global"], 2),
        _code(uneven["strategy"]),
        _code(special["strategy"]),
        number(special["domain_information_bits"], 2),
        number(min(losses), 3),
        number(max(losses), 3),
    )


def _quality(best: Mapping[str, Any], comparisons: Sequence[Comparison]) -> Markup:
    text = Markup("<strong>Quality.</strong> {} reaches a loss of {} nats per token (perplexity {}).").format(
        _code(best["strategy"]), number(best["val_nats"], 3), number(best["val_perplexity"], 2)
    )
    if not comparisons:
        return text
    nearest = comparisons[0]
    estimate = nearest.nats.estimate
    text += Markup(" Next is {}: {} nats higher, {} % in perplexity").format(
        _code(nearest.strategy), number(estimate.mean, 3), number(100 * math.expm1(min(estimate.mean, 700.0)), 1)
    )
    if estimate.n == 1:
        return text + Markup(
            ". This is one seed. Run at least three (<code>--seeds 3</code>) to see how much seeds vary."
        )
    low, high = estimate.interval
    text += Markup(" (95&nbsp;% interval of the difference: {} to {}; {} paired seeds).").format(
        number(low, 3), number(high, 3), estimate.n
    )
    if not nearest.is_beaten:
        level = 1 - 0.05 / len(comparisons)  # the first step of Holm
        needed = seeds_needed(Hypothesis("higher"), estimate.mean, estimate.sd, level=level, limit=1000)
        if needed is not None and needed > estimate.n:
            text += Markup(" Confirming a difference of this size would take {} seeds.").format(
                "1000 or more" if needed >= 1000 else f"about {needed}"
            )
    text += (
        " The best strategy was chosen by the same losses that now judge it, so a small lead looks better than it is."
    )
    return text


def _balance(rows: Sequence[Mapping[str, Any]]) -> Markup:
    best, worst = _least_and_most(rows, "maxvio_global")
    text = Markup("<strong>Balance.</strong> {} spreads the test text most evenly: on average over layers, its").format(
        _code(best["strategy"])
    )
    if len(rows) == 1:
        text = Markup("<strong>Balance.</strong> On the test text, on average over layers, the")
    text += Markup(
        " busiest expert carries {} times the mean load (MaxVio {}; chance alone would give at least {})."
    ).format(number(1 + best["maxvio_global"], 2), number(best["maxvio_global"], 2), number(best["maxvio_floor"], 2))
    if worst is best:
        return text
    return text + Markup(" The least even is {}: {} times the mean (MaxVio {}).").format(
        _code(worst["strategy"]), number(1 + worst["maxvio_global"], 2), number(worst["maxvio_global"], 2)
    )


def _specialisation(rows: Sequence[Mapping[str, Any]], num_domains: int) -> Markup:
    low, high = _least_and_most(rows, "domain_information_bits")
    return Markup(
        "<strong>Specialisation.</strong> The choice of experts reveals most about a token's domain under {}: {} of at "
        "most {} bits (log2 of {} domains). It reveals least under {}: {} bits."
    ).format(
        _code(high["strategy"]),
        number(high["domain_information_bits"], 3),
        number(math.log2(max(num_domains, 1)), 2),
        num_domains,
        _code(low["strategy"]),
        number(low["domain_information_bits"], 3),
    )


def _dead_experts(rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[Markup]:
    """One sentence, or none if every expert was used."""
    rows_with_dead = [row for row in rows if row["dead_experts"] > 0]
    if not rows_with_dead:
        return []
    total = len(runs[0].config["layers"]) * runs[0].config["num_experts"]
    counts = [Markup("{} {}").format(_code(row["strategy"]), f"{row['dead_experts']:.3g}") for row in rows_with_dead]
    return [
        Markup("<strong>Dead experts</strong>, of {} in all layers together: {}.").format(
            total, Markup(", ").join(counts)
        )
    ]
