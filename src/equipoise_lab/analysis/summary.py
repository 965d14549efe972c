"""results of runs -> the table that page and terminal share: what each figure of a run is called and means."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise_lab.records import Run

__all__ = ["COLUMNS", "Column", "mean_and_sd", "number", "summary_rows", "unequal_terms"]


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
        "Cross-entropy of the next token on test text, in nats a token, without any balancing loss. Lower is better.",
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
        "bits/byte",
        3,
        "The same loss in bits, per byte of text instead of per token: comparable across tokenizers. Lower is better.",
    ),
    Column(
        "maxvio_global",
        "MaxVio, test",
        "maxvio global",
        3,
        "(busiest expert's load − mean load) / mean load, per layer, then the mean over layers, on test text "
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
        "dead, test text",
        1,
        "Experts that got no token of the test text, all layers together.",
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
    "score_function",
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
