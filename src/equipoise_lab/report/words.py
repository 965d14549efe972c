"""finished runs -> who won, by how much and whether that is more than chance, in sentences and a table."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from equipoise_lab.analysis import Hypothesis, Judgement, judge, judge_family, paired_differences, seeds_needed
from equipoise_lab.analysis.summary import number, summary_rows
from equipoise_lab.records import Run

__all__ = ["Against", "Outcome", "outcome"]

COMPARED = ("val_nats", "maxvio_global", "domain_information_bits")


@dataclass(frozen=True)
class Against:
    """The strategy of the lowest loss against another one: differences of the other, paired by seed."""

    strategy: str
    nats: Judgement  # other - best; the claim is that it is higher
    maxvio: Judgement  # other - best; the claim is that they differ in the direction seen

    @property
    def is_beaten(self) -> bool:
        return self.nats.verdict == "supported"

    @property
    def says(self) -> str:
        if self.nats.estimate.n == 1:
            return "one seed: undecided"
        return "significant" if self.is_beaten else "undecided"


@dataclass(frozen=True)
class Outcome:
    """``headline``: one sentence; ``findings``: what else is to be said; ``against``: the winner's comparisons."""

    headline: Markup
    findings: list[Markup]
    best: str | None = None
    against: tuple[Against, ...] = ()


def outcome(runs: Sequence[Run]) -> Outcome:
    """What finished runs say. Strategy names are escaped.

    The best strategy is that of the lowest mean loss on test text, over the seeds that all have. Its differences to all
    others are paired by seed and judged as one family (Holm, 5 %): *significant* where the interval of the paired
    difference leaves out 0 and the family agrees.
    """
    rows = summary_rows(runs)
    if not rows:
        return Outcome(Markup("No run is finished, so nothing is compared yet."), [])
    sound = [row for row in rows if all(math.isfinite(row[key]) for key in COMPARED)]
    said = [
        Markup(
            "{} <strong>diverged</strong>: its loss, balance or domain information is not a finite number, so it is "
            "left out of what follows."
        ).format(_name(row))
        for row in rows
        if row not in sound
    ]
    if not sound:
        return Outcome(Markup("Every finished run diverged."), said)
    if len(sound) == 1:
        headline = Markup("Only {} is finished, so there is nothing to compare it with.").format(_name(sound[0]))
        return Outcome(headline, [*said, _balance(sound), *_dead(sound, runs)])
    sound, apart = _sharing(sound)
    seeds = set.intersection(*(set(row["seeds"]) for row in sound))
    sound = _on(sound, seeds, runs)
    if apart:
        said.append(
            Markup("<strong>Left out</strong> of what follows: {}, without a seed that the others have.").format(
                _listed([row["strategy"] for row in apart])
            )
        )
    best = min(sound, key=lambda row: row["val_nats"])
    against = _compare(best, [row for row in sound if row is not best], runs)
    if seeds and any(set(row["seeds"]) != seeds for row in rows if row["strategy"] in {r["strategy"] for r in sound}):
        said.append(
            Markup(
                "<strong>Seeds.</strong> Not every strategy has every seed; what follows is of those that all "
                "share: {}."
            ).format(", ".join(map(str, sorted(seeds))))
        )
    said += [_quality(best, against), _balance(sound), _information(sound, len(runs[0].config["domains"]))]
    return Outcome(
        _headline(best, sound, against, not apart), [*said, *_dead(sound, runs)], best["strategy"], tuple(against)
    )


def _sharing(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Where no seed is of all rows: those that have the seed which most have, and the others."""
    number = Counter(seed for row in rows for seed in row["seeds"])
    seed = min(number, key=lambda seed: (-number[seed], seed))
    having = [row for row in rows if seed in row["seeds"]]
    return (having, [row for row in rows if row not in having]) if len(having) > 1 else (rows, [])


def _on(rows: Sequence[Mapping[str, Any]], seeds: set[int], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the runs with these seeds only; as they are where there is no such seed."""
    if not seeds:
        return [dict(row) for row in rows]
    kept = {row["strategy"] for row in rows}
    return summary_rows(run for run in runs if run.config["seed"] in seeds and run.config["strategy"] in kept)


def _compare(best: Mapping[str, Any], others: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[Against]:
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        if run.complete:
            for key in COMPARED[:2]:
                values.setdefault(run.config["strategy"], {}).setdefault(key, {})[run.config["seed"]] = run.result[key]
    ours, nats, maxvio = values[best["strategy"]], {}, {}
    for row in others:
        name = row["strategy"]
        theirs = values[name]
        if not ours["val_nats"].keys() & theirs["val_nats"].keys():
            continue  # no seed in common
        nats[name] = judge(
            paired_differences(theirs["val_nats"], ours["val_nats"], intersect=True), Hypothesis("higher")
        )
        difference = paired_differences(theirs["maxvio_global"], ours["maxvio_global"], intersect=True)
        maxvio[name] = judge(difference, Hypothesis("higher" if difference.mean > 0 else "lower"))
    if not nats:
        return []
    family, balance = judge_family(nats), judge_family(maxvio)
    found = [Against(name, family[name], balance[name]) for name in family]
    return sorted(found, key=lambda one: one.nats.estimate.mean)


def _name(row: Mapping[str, Any]) -> Markup:
    return _code(row["strategy"])


def _code(strategy: str) -> Markup:
    return Markup("<code>{}</code>").format(strategy)


def _listed(strategies: Sequence[str]) -> Markup:
    names = [_code(strategy) for strategy in strategies]
    return names[0] if len(names) == 1 else Markup("{} and {}").format(Markup(", ").join(names[:-1]), names[-1])


def _headline(
    best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], against: Sequence[Against], is_all: bool
) -> Markup:
    beaten = [one.strategy for one in against if one.is_beaten]
    open_ = [one.strategy for one in against if not one.is_beaten]
    even = min(rows, key=lambda row: row["maxvio_global"])
    if not against:
        said = Markup("{} has the lowest loss, on seeds that no other strategy has, so nothing is compared.").format(
            _name(best)
        )
    elif all(one.nats.estimate.n == 1 for one in against):
        said = Markup("{} has the lowest loss of one seed, which decides nothing about quality.").format(_name(best))
    elif not open_:
        said = Markup("{} won: its loss is lower than that of {}, and not by chance.").format(
            _name(best), "every other strategy" if len(beaten) > 1 and is_all else _listed(beaten)
        )
    elif beaten:
        said = Markup("{} has the lowest loss: lower than that of {}; its lead on {} may be chance.").format(
            _name(best), _listed(beaten), _listed(open_)
        )
    else:
        said = Markup("No strategy won: {} has the lowest loss, but its lead may be chance.").format(_name(best))
    if even is best:
        return said + Markup(" Its load is the most even too.")
    return said + Markup(" The most even load is that of {}: MaxVio {}, against {}.").format(
        _name(even), number(even["maxvio_global"], 3), number(best["maxvio_global"], 3)
    )


def _quality(best: Mapping[str, Any], against: Sequence[Against]) -> Markup:
    said = Markup("<strong>Quality.</strong> {} has {} nats a token, perplexity {}.").format(
        _name(best), number(best["val_nats"], 3), number(best["val_perplexity"], 2)
    )
    if not against:
        return said
    nearest = against[0]
    estimate = nearest.nats.estimate
    said += Markup(" Next is {}, {} nats above, {} % in perplexity").format(
        _code(nearest.strategy), number(estimate.mean, 3), number(100 * math.expm1(estimate.mean), 1)
    )
    if estimate.n == 1:
        return said + Markup(
            ": from one seed. Run at least three (<code>--seeds 3</code>) to learn how far seeds differ."
        )
    low, high = estimate.interval
    said += Markup(" (95&nbsp;% interval of the difference: {} to {}, {} paired seeds).").format(
        number(low, 3), number(high, 3), estimate.n
    )
    if not nearest.is_beaten:
        level = 1 - 0.05 / len(against)  # the first step of Holm
        needed = seeds_needed(Hypothesis("higher"), estimate.mean, estimate.sd, level=level, limit=1000)
        if needed is not None and needed > estimate.n:
            said += Markup(" To decide a difference of this size would take about {} seeds.").format(
                "1000 or more" if needed >= 1000 else needed
            )
    said += " The best was picked by the same numbers that it is judged by, which flatters a small lead."
    return said


def _balance(rows: Sequence[Mapping[str, Any]]) -> Markup:
    best, worst = (pick(rows, key=lambda row: row["maxvio_global"]) for pick in (min, max))
    said = Markup("<strong>Balance.</strong> {} spreads the test text most evenly: its").format(_name(best))
    if len(rows) == 1:
        said = Markup("<strong>Balance.</strong> On the test text the")
    said += Markup(" busiest expert carries {} times the mean load (MaxVio {}; sampling alone would show {}).").format(
        number(1 + best["maxvio_global"], 2), number(best["maxvio_global"], 2), number(best["maxvio_floor"], 2)
    )
    if worst is best:
        return said
    return said + Markup(" The least even is {}, with {} times the mean (MaxVio {}).").format(
        _name(worst), number(1 + worst["maxvio_global"], 2), number(worst["maxvio_global"], 2)
    )


def _information(rows: Sequence[Mapping[str, Any]], num_domains: int) -> Markup:
    low, high = (pick(rows, key=lambda row: row["domain_information_bits"]) for pick in (min, max))
    return Markup(
        "<strong>Specialisation.</strong> Experts tell most about the domain of their tokens under {}: {} bits of at "
        "most {} (log2 of {} domains). They tell least under {}: {} bits."
    ).format(
        _name(high),
        number(high["domain_information_bits"], 3),
        number(math.log2(max(num_domains, 1)), 2),
        num_domains,
        _name(low),
        number(low["domain_information_bits"], 3),
    )


def _dead(rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[Markup]:
    dead = [row for row in rows if row["dead_experts"] > 0]
    if not dead:
        return []
    total = len(runs[0].config["layers"]) * runs[0].config["num_experts"]
    parts = [Markup("{} {}").format(_name(row), f"{row['dead_experts']:.3g}") for row in dead]
    return [
        Markup("<strong>Dead experts</strong>, out of {} in all layers: {}.").format(total, Markup(", ").join(parts))
    ]
