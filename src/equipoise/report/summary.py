"""results of runs -> the table and the sentences. Page and terminal share these definitions."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from equipoise.records import Run

__all__ = ["COLUMNS", "Column", "findings", "summary_rows", "unequal_terms"]

NOISE_NATS = 0.15  # 95 % interval of a difference between two strategies in the prototype: three paired seeds


@dataclass(frozen=True)
class Column:
    """One column of the table: ``key`` is the key in ``result.json`` and in ``summary_rows``."""

    key: str
    title: str
    short: str  # for a terminal
    digits: int
    definition: str

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell: the mean over seeds, and ± their standard deviation where there are several."""
        mean, sd = row[self.key], row[f"{self.key}_sd"]
        return number(mean, self.digits) + ("" if sd is None else f" ± {number(sd, self.digits)}")


COLUMNS = (
    Column(
        "val_nats",
        "Loss, nats",
        "loss nats",
        3,
        "Cross-entropy of the next token on validation text, in nats a token, without any balancing loss. Lower is "
        "better.",
    ),
    Column(
        "val_perplexity",
        "Perplexity",
        "ppl",
        2,
        "exp(loss): as unsure as an even choice among that many tokens. Lower is better.",
    ),
    Column(
        "val_bits_per_byte",
        "Bits per byte",
        "bits/ byte",
        3,
        "The same loss in bits, per byte of text instead of per token: comparable across tokenizers. Lower is better.",
    ),
    Column(
        "maxvio_global",
        "MaxVio, validation",
        "maxvio global",
        3,
        "(busiest expert's load − mean load) / mean load, per layer, then the mean over layers, on validation text "
        "with all domains pooled. 0 is even; 1 means that the busiest expert carries twice the mean.",
    ),
    Column(
        "maxvio_floor",
        "Its floor",
        "floor",
        3,
        "The MaxVio that perfect routing with independent choices would show on as many tokens from sampling alone: "
        "a lower bound to read the column before it against.",
    ),
    Column(
        "maxvio_batch",
        "MaxVio, batch",
        "maxvio batch",
        3,
        "The same quantity on the load of one training step; mean over the last tenth of the steps.",
    ),
    Column(
        "domain_information_bits",
        "Domain information, bits",
        "domain bits",
        3,
        "I(domain; expert): how many bits the choice of an expert tells about the domain of its token, "
        "mean over layers. 0: experts ignore the domain; at most log2(number of domains).",
    ),
    Column(
        "dead_experts",
        "Dead experts",
        "dead",
        1,
        "Experts that got no token of the validation text, all layers together.",
    ),
    Column(
        "tokens_per_second",
        "Tokens/s",
        "tokens/s",
        0,
        "Training speed of this run on its machine. Comparable only if the runs had the machine to themselves.",
    ),
)


def number(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.2e}"
    return text.replace("-", "−")


def summary_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The table: one row a strategy, in order of first appearance. Runs that are not finished are left out.

    A row holds ``strategy``, ``seeds`` (list), and for each of ``COLUMNS`` its ``key`` (mean over seeds) and
    ``key_sd`` (their standard deviation with n - 1, or None with one seed).
    """
    results: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for run in runs:
        if run.complete:
            results.setdefault(run.config["strategy"], []).append((run.config["seed"], run.result))
    rows = []
    for strategy, found in results.items():
        row: dict[str, Any] = {"strategy": strategy, "seeds": [seed for seed, _ in found]}
        for column in COLUMNS:
            row[column.key], row[f"{column.key}_sd"] = mean_and_sd([result[column.key] for _, result in found])
        rows.append(row)
    return rows


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    values = [math.nan if value is None else float(value) for value in values]
    if not all(math.isfinite(value) for value in values):
        return math.nan, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


EQUAL = (
    "arch",
    "num_parameters",
    "num_experts",
    "experts_per_token",
    "layers",
    "domains",
    "steps",
    "sequence_length",
    "sequences_per_micro_batch",
    "micro_batches_per_step",
    "learning_rate",
    "data",
    "shuffled",
    "gate",
    "order",
    "dtype",
    "wrapper",
    "corpus_fingerprint",
    "vocab_size",
)
EQUAL_OPTIONS = ("model", "warmup", "weight_decay", "clip", "evaluation_sequences")  # of the command line, the rest


def unequal_terms(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that must be the same for runs to be comparable, and are not."""
    terms = [
        {key: config.get(key) for key in EQUAL} | {key: config.get("options", {}).get(key) for key in EQUAL_OPTIONS}
        for config in configs
    ]
    return [key for key in terms[0] if any(other[key] != terms[0][key] for other in terms[1:])]


def findings(runs: Sequence[Run]) -> list[Markup]:
    """What happened, in sentences made from the numbers; strategy names are escaped."""
    rows = summary_rows(runs)
    if not rows:
        return [Markup("No run is finished, so nothing is compared yet; the figures show how far the runs are.")]
    compared = ("val_nats", "maxvio_global", "domain_information_bits")
    sound = [row for row in rows if all(math.isfinite(row[key]) for key in compared)]
    said = [
        Markup(
            "{} <strong>diverged</strong>: its loss, balance or domain information is not a finite number, so it is "
            "left out of what follows."
        ).format(_name(row))
        for row in rows
        if row not in sound
    ]
    if not sound:
        return said
    if len(sound) == 1:
        said.append(Markup("Only {} is finished, so there is nothing to compare it with.").format(_name(sound[0])))
        return said
    said.append(_balance(sound))
    said.append(_information(sound, len(runs[0].config["domains"])))
    dead = [row for row in sound if row["dead_experts"] > 0]
    if dead:
        total = len(runs[0].config["layers"]) * runs[0].config["num_experts"]
        parts = [Markup("{} {}").format(_name(row), f"{row['dead_experts']:.3g}") for row in dead]
        said.append(
            Markup("<strong>Dead experts</strong>, out of {} in all layers: {}.").format(
                total, Markup(", ").join(parts)
            )
        )
    said += _quality(sound, runs)
    return said


def _name(row: Mapping[str, Any]) -> Markup:
    return Markup("<code>{}</code>").format(row["strategy"])


def _balance(rows: Sequence[Mapping[str, Any]]) -> Markup:
    best, worst = (pick(rows, key=lambda row: row["maxvio_global"]) for pick in (min, max))
    return Markup(
        "<strong>Balance.</strong> {} spreads the validation text most evenly: its busiest expert carries {} times the "
        "mean load (MaxVio {}; sampling alone would show {}). The least even is {}, with {} times the mean (MaxVio {})."
    ).format(
        _name(best),
        number(1 + best["maxvio_global"], 2),
        number(best["maxvio_global"], 2),
        number(best["maxvio_floor"], 2),
        _name(worst),
        number(1 + worst["maxvio_global"], 2),
        number(worst["maxvio_global"], 2),
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


def _quality(rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[Markup]:
    nats: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.complete:
            nats.setdefault(run.config["strategy"], {})[run.config["seed"]] = run.result["val_nats"]
    best = min(rows, key=lambda row: row["val_nats"])
    near: list[Markup] = []
    far: list[Markup] = []
    num_seeds = [len(best["seeds"])]
    for row in rows:
        if row is best:
            continue
        ours, theirs = nats[row["strategy"]], nats[best["strategy"]]
        shared = sorted(ours.keys() & theirs.keys())
        num_seeds.append(len(shared))
        if not shared:
            continue
        mean, sd = mean_and_sd([ours[seed] - theirs[seed] for seed in shared])
        more = number(mean, 3) + ("" if sd is None else f" ± {number(sd, 3)}")
        (near if abs(mean) < NOISE_NATS else far).append(Markup("{} by {}").format(_name(row), more))
    said = Markup("<strong>Quality.</strong> {} has the lowest validation loss: {} nats, perplexity {}.").format(
        _name(best), number(best["val_nats"], 3), number(best["val_perplexity"], 2)
    )
    if near:
        said += Markup(" Higher, but by less than {} nats: {}; this is not read as a result.").format(
            NOISE_NATS, Markup(", ").join(near)
        )
    if far:
        said += Markup(" Higher by {} nats or more: {}.").format(NOISE_NATS, Markup(", ").join(far))
    if max(num_seeds) > 1:
        said += Markup(" Differences are paired by seed, mean ± standard deviation over the seeds both have.")
    few = min(num_seeds)
    caution = Markup(
        "<strong>Caution.</strong> {} nothing about perplexity below a stated difference. The one stated here is {} "
        "nats, a factor of {} in perplexity: the 95&nbsp;% interval of a difference between two strategies in a "
        "prototype of this size, over three paired seeds. A larger difference from few seeds is a hint, not a proof."
    ).format(
        "One seed decides" if few <= 1 else f"{few} seeds decide",
        NOISE_NATS,
        number(math.exp(NOISE_NATS), 2),
    )
    return [said, caution]
