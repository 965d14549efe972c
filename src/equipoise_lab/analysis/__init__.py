"""Analysis of recorded runs and audits: tables, figures, expert specialisation, verdicts over seeds. No torch.

    folder ── read_records ──> Records ── runs(), steps(), experts(), ... ──> pyarrow tables ── figures ──> plotly
    counts by domain and token ── domain_information, coactivation, typical_tokens, ... ──> specialisation

    values by seed ── paired_differences, trend ──> Estimate ── judge ──> Judgement ── judge_family ──> Judgement
                                                       └── noise, power, seeds_needed: how many seeds would decide

``level`` is always the level of a two-sided interval. ``Judgement.p`` is two-sided too: the verdict is decided if
``p < 1 - level``.

>>> wide = {0: 5.41, 1: 5.37, 2: 5.44, 3: 5.40}  # validation loss by seed, global-batch scope
>>> narrow = {0: 5.45, 1: 5.43, 2: 5.49, 3: 5.43}  # micro-batch scope
>>> difference = paired_differences(wide, narrow)
>>> print(difference)
-0.045 [-0.0655, -0.0245], 95 % of 4
>>> judge(difference, Hypothesis("lower")).verdict
'supported'
>>> judge(difference, Hypothesis("equal", margin=0.05)).verdict
'undecided'
>>> seeds_needed(Hypothesis("equal", margin=0.05), difference.mean, difference.sd)
55
"""

import importlib
from typing import TYPE_CHECKING, Any

from equipoise_lab.analysis.power import MAX_SEEDS, Noise, detectable_effect, noise, power, seeds_needed
from equipoise_lab.analysis.specialisation import (
    Measured,
    Typical,
    coactivation,
    coactivation_of,
    domain_distances,
    domain_information,
    information_by_level,
    mean_domain_distance,
    partners,
    rank_load,
    router_saturation,
    selection_frequency,
    typical_tokens,
    vocabulary_specialisation,
)
from equipoise_lab.analysis.statistics import Estimate, estimate, paired_differences, trend
from equipoise_lab.analysis.verdicts import Hypothesis, Judgement, holm, judge, judge_family

if TYPE_CHECKING:
    from equipoise_lab.analysis import figures, tables
    from equipoise_lab.analysis.tables import Records, read_records

__all__ = [
    "MAX_SEEDS",
    "Estimate",
    "Hypothesis",
    "Judgement",
    "Measured",
    "Noise",
    "Records",
    "Typical",
    "coactivation",
    "coactivation_of",
    "detectable_effect",
    "domain_distances",
    "domain_information",
    "estimate",
    "figures",
    "holm",
    "information_by_level",
    "judge",
    "judge_family",
    "mean_domain_distance",
    "noise",
    "paired_differences",
    "partners",
    "power",
    "rank_load",
    "read_records",
    "router_saturation",
    "seeds_needed",
    "selection_frequency",
    "tables",
    "trend",
    "typical_tokens",
    "vocabulary_specialisation",
]


def __getattr__(name: str) -> Any:  # pyarrow and plotly are imported on first use
    if name in ("figures", "tables"):
        return importlib.import_module(f"equipoise_lab.analysis.{name}")
    if name in ("Records", "read_records"):
        return getattr(importlib.import_module("equipoise_lab.analysis.tables"), name)
    raise AttributeError(f"module 'equipoise_lab.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
