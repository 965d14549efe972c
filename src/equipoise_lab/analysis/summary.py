"""The results table that the page and the terminal share: title, meaning and format of each column."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise_lab.records import Run

__all__ = ["COLUMNS", "Column", "mean_and_sd", "number", "summary_rows", "unequal_terms"]


@dataclass(frozen=True)
class Column:
    """One column of the table. ``key`` is its key in ``result.json`` and in ``summary_rows``.

    ``title`` names the quantity on the page, in the terminal and in copied tables.
    """

    key: str
    title: str
    digits: int
    definition: str
    is_count: bool = False

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell: the mean over seeds, ± their standard deviation if there are several."""
        mean, sd = row[self.key], row[f"{self.key}_sd"]
        return self._number(mean) + ("" if sd is None else f" ± {self._number(sd)}")

    def _number(self, value: float) -> str:
        is_whole = self.is_count and float(value).is_integer()  # the mean of counts over seeds may be no count
        return number(value, 0 if is_whole else self.digits)


COLUMNS = (
    Column(
        "val_nats",
        "Loss, nats",
        3,
        "Cross-entropy of the next token on test text, in nats per token, without balancing losses. Lower is better.",
    ),
    Column(
        "val_perplexity",
        "Perplexity",
        2,
        "exp(loss): the model is as uncertain as if it chose evenly among this many tokens. Lower is better.",
    ),
    Column(
        "val_bits_per_byte",
        "Bits per byte",
        3,
        "The same loss in bits per byte of text: comparable across tokenizers. Lower is better.",
    ),
    Column(
        "maxvio_global",
        "MaxVio, test",
        3,
        "(load of the busiest expert − mean load) / mean load, on test text with all domains pooled; mean over layers. "
        "0 is even. At 1 the busiest expert carries twice the mean load.",
    ),
    Column(
        "maxvio_floor",
        "MaxVio floor",
        3,
        "MaxVio from sampling alone: what a perfectly even router with independent choices would show on this many "
        "tokens. Read the MaxVio on test text against it.",
    ),
    Column(
        "maxvio_batch",
        "MaxVio, batch",
        3,
        "MaxVio of the load of one training step, mean over the last tenth of the steps.",
    ),
    Column(
        "domain_information_bits",
        "Domain information, bits",
        3,
        "I(domain; expert): how many bits the choice of experts reveals about a token's domain, mean over layers. "
        "0 if experts ignore the domain; at most log2(number of domains).",
    ),
    Column(
        "dead_experts",
        "Dead experts",
        1,
        "Experts that got no token of the test text, total over all layers.",
        is_count=True,
    ),
    Column(
        "tokens_per_second",
        "Tokens/s",
        0,
        "Training speed of the run. Comparable only if each run had the same machine to itself.",
    ),
)


def number(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.2e}"
    return text.replace("-", "−")


def summary_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The table, one row per strategy in order of first appearance. Unfinished runs are left out.

    A row holds ``strategy``, ``seeds`` (a list), and for each of ``COLUMNS`` its ``key`` (mean over seeds) and
    ``key_sd`` (standard deviation with n - 1, None with one seed).
    """
    results: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for run in runs:
        if run.complete:
            results.setdefault(run.config["strategy"], []).append((run.config["seed"], run.result))
    rows = []
    for strategy, by_seed in results.items():
        row: dict[str, Any] = {"strategy": strategy, "seeds": [seed for seed, _ in by_seed]}
        for column in COLUMNS:
            row[column.key], row[f"{column.key}_sd"] = mean_and_sd([result[column.key] for _, result in by_seed])
        rows.append(row)
    return rows


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """(nan, None) if a value is None or not finite."""
    values = [math.nan if value is None else float(value) for value in values]
    if not all(math.isfinite(value) for value in values):
        return math.nan, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


COMPARED_SETTINGS = (
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
# Further settings that a run stores only among its command-line options.
COMPARED_OPTIONS = ("model", "warmup", "decay_to", "weight_decay", "clip", "evaluation_sequences")

NEWER_OPTIONS = {"decay_to": 0.1}  # what runs did that were recorded before there was such an option


def unequal_terms(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that differ between runs although comparable runs must share them."""
    settings = [
        {key: config.get(key) for key in COMPARED_SETTINGS}
        | {key: config.get("options", {}).get(key, NEWER_OPTIONS.get(key)) for key in COMPARED_OPTIONS}
        for config in configs
    ]
    return [key for key in settings[0] if any(other[key] != settings[0][key] for other in settings[1:])]
