"""Trains the same model under several strategies and compares them."""

import dataclasses
import itertools
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch

from equipoise.balancers import format_strategy
from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cores import num_cores
from equipoise_lab.records import Run, is_new
from equipoise_lab.train.balancers import parse_lab_strategy
from equipoise_lab.train.comparison_folder import ComparisonFolder
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.loop import check, check_same_options, train
from equipoise_lab.train.ranks import LostRank, Ranks, is_shared, join_ranks
from equipoise_lab.train.resume_advice import resume_advice_of_all
from equipoise_lab.train.run_folder import SilentWatcher, Watcher
from equipoise_lab.train.run_text import load_text
from equipoise_lab.train.side_by_side import Display, Outcome, side_by_side
from equipoise_lab.train.tracker_kinds import where_to_look

__all__ = ["compare"]


def compare(
    config: Compare, watcher: Display, command: str = "", ranks: Ranks | None = None
) -> tuple[list[dict[str, Any]], EquipoiseError | None]:
    """Trains every strategy and seed, and writes ``results.json`` and ``report.html`` into ``config.out``.

    Returns the results and the first failure (None if all runs succeeded), on every rank. The order is by seed, then by
    strategy as listed. A run that fails does not stop the others: they are finished, recorded and reported.
    ``config.workers`` runs go in parallel. Each of them then gets a watcher of its own from ``watcher.add_run()``.

    Nothing is written before the options and the text are right. If no run makes a step, nothing remains.
    """
    ranks = join_ranks() if ranks is None else ranks
    watcher = watcher if ranks.rank == 0 else SilentWatcher()
    check_same_options(config, ranks)
    ranks.run_on_all(_check_options, config, ranks.size)
    folder = ComparisonFolder(config)
    ranks.run_on_first(folder.check)
    runs = [dataclasses.replace(run, resume=True) for run in config.runs()]  # their folders belong to us
    for run in runs:
        check(run, ranks)
    if not ranks.run_on_first(_are_complete, runs):
        with ranks.report_lost_rank(lambda: "before the first run", lambda: "Start the same command again."):
            load_text(runs[0], watcher, ranks)  # the runs read it from the cache
        for name in config.trackers:
            watcher.say(where_to_look(name, config.out))
    try:
        ranks.run_on_first(folder.claim, command)
        return _train_all(config, runs, watcher, command, ranks, folder)
    finally:
        folder.release()  # does nothing but on rank 0


def _train_all(
    config: Compare, runs: Sequence[Train], watcher: Display, command: str, ranks: Ranks, folder: ComparisonFolder
) -> tuple[list[dict[str, Any]], EquipoiseError | None]:
    results, failures = dict[Train, dict[str, Any]](), dict[Train, EquipoiseError]()
    workers = _num_workers(config, ranks)
    if workers > 1:
        threads = max(1, num_cores() // workers)
        outcomes = side_by_side(runs, watcher, command, workers=workers, threads=threads)
    else:
        outcomes = _one_after_another(runs, watcher, command, ranks)
    try:
        with closing(outcomes):
            for run, outcome in outcomes:
                if not isinstance(outcome, EquipoiseError):
                    results[run] = outcome
                    continue
                watcher.say(f"{run.label}, seed {run.seed}: {outcome}")
                failures[run] = outcome
                if run == runs[0] and ranks.run_on_first(is_new, run.out):
                    raise outcome  # every strategy would fail alike, for example on a bad model folder
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_advice_of_all(runs) if ranks.rank == 0 else "") from None
    in_order = [results[run] for run in runs if run in results]
    failed = [failures[run] for run in runs if run in failures]
    ranks.run_on_first(folder.finish, in_order, failed)
    return in_order, failed[0] if failed else None


def _are_complete(runs: Sequence[Train]) -> bool:
    return all(not is_new(run.out) and Run(run.out).complete for run in runs)


def _one_after_another(
    runs: Sequence[Train], watcher: Watcher, command: str, ranks: Ranks
) -> Generator[tuple[Train, Outcome]]:
    """Like ``side_by_side``, but in this process and on all its ranks."""
    for run in runs:
        try:
            yield run, train(run, watcher, command, ranks, says_text=False)
        except EquipoiseError as error:
            if isinstance(error, LostRank) or (ranks.size > 1 and not is_shared(error)):
                raise  # the ranks no longer agree on what to do next
            watcher.end()
            yield run, error


def _num_workers(config: Compare, ranks: Ranks) -> int:
    if config.workers is not None:
        return min(config.workers, len(config.runs()))
    if ranks.size > 1 or torch.cuda.is_available() or os.name != "posix":
        return 1
    return min(num_cores(), len(config.runs()))


def _check_options(config: Compare, num_ranks: int) -> None:
    config.check()
    if num_ranks > 1 and config.workers not in (None, 1):
        raise UsageError(
            f"--workers must be 1 under torchrun, because all ranks train every run together: got {config.workers} on "
            f"{num_ranks} ranks. Leave it out."
        )
    canonical = [format_strategy(parse_lab_strategy(strategy)) for strategy in config.strategies]
    for name, same in itertools.combinations(range(len(canonical)), 2):
        if canonical[name] == canonical[same]:
            raise UsageError(
                f"--strategies must be different: got {config.strategies[name]} and {config.strategies[same]}, which "
                "are the same. Remove one."
            )
