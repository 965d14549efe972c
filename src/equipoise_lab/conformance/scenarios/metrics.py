"""The load imbalance that a framework reports, by its own formula."""

from collections.abc import Sequence

from equipoise_lab.conformance import reference
from equipoise_lab.conformance.driver import Batch, Driver, NotOffered
from equipoise_lab.conformance.measure import Measurement, compare_value, shown
from equipoise_lab.conformance.scenarios.counting import BIASED
from equipoise_lab.conformance.scenarios.scenario import rows_of, scenario

METRIC = "a metric of load imbalance"


def _imbalance(framework: type[Driver], ranks: Sequence[Sequence[Batch]], rank: int = 0) -> Measurement:
    if framework.imbalance_of is None:
        raise NotOffered(METRIC)
    result = framework(BIASED).train_step(ranks[rank])
    return compare_value(shown(result.imbalance, METRIC), framework.imbalance_of(reference.counts(ranks, BIASED)[0]))


@scenario(94, why="Names and formulas differ between frameworks. Each is judged by its own, on the counts of the step.")
def imbalance(framework: type[Driver], rank: int) -> Measurement:
    """Which load imbalance is reported for one micro-batch?"""
    return _imbalance(framework, [[rows_of(8, 8, of=8, seed=110)]])


@scenario(93, why="The imbalance of a step is that of its load, the sum of all micro-batches.")
def imbalance_of_two_micro_batches(framework: type[Driver], rank: int) -> Measurement:
    """Which load imbalance is reported for a step of two micro-batches?"""
    return _imbalance(framework, [[rows_of(16, of=16, seed=111), rows_of(4, of=4, seed=112)]])


@scenario(93, ranks=2, why="The imbalance of a step is that of its load on all ranks. Two opposite ranks are even.")
def imbalance_of_two_ranks(framework: type[Driver], rank: int) -> Measurement:
    """Which load imbalance is reported for two ranks, whose loads are opposite?"""
    batch = rows_of(12, 12, of=12, seed=113)
    return _imbalance(framework, [[batch], [Batch(batch.logits.flip(-1))]], rank)


@scenario(59, why="A recomputed token is the same token.")
def imbalance_under_recomputation(framework: type[Driver], rank: int) -> Measurement:
    """Which load imbalance is reported, if one of two micro-batches has more tokens and both are recomputed?"""
    if framework.imbalance_of is None:
        raise NotOffered(METRIC)
    batches = [rows_of(24, of=24, seed=114), rows_of(8, of=8, seed=115)]
    result = framework(BIASED).train_step(batches, recompute="non_reentrant")
    return compare_value(
        shown(result.imbalance, METRIC), framework.imbalance_of(reference.counts([batches], BIASED)[0])
    )


@scenario(64, why="An evaluation is not training, and its load is not that of the step.")
def imbalance_beside_evaluation(framework: type[Driver], rank: int) -> Measurement:
    """Which load imbalance is reported, if an evaluation stands between two micro-batches?"""
    first, last = rows_of(16, of=16, seed=116), rows_of(16, of=16, seed=117)
    between = Batch(rows_of(16, of=16, seed=118).logits.flip(-1), mode="evaluate")
    return _imbalance(framework, [[first, between, last]])
