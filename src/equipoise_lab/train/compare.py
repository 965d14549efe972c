"""Trains the same model under several strategies and compares them."""

import dataclasses
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from equipoise.balancers import format_strategy
from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cores import num_cores
from equipoise_lab.records import Comparison, Run, is_new, read_json, write_json
from equipoise_lab.report import write_report
from equipoise_lab.train.balancers import parse_lab_strategy
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.loop import check, check_same_options, train
from equipoise_lab.train.ranks import LostRank, Ranks, is_shared, join_ranks
from equipoise_lab.train.resume_advice import resume_advice_of_all
from equipoise_lab.train.run_folder import SilentWatcher, Watcher
from equipoise_lab.train.side_by_side import Display, Outcome, side_by_side

__all__ = ["compare"]


def compare(
    config: Compare, watcher: Display, command: str = "", ranks: Ranks | None = None
) -> tuple[list[dict[str, Any]], EquipoiseError | None]:
    """Trains every strategy and seed, and writes ``results.json`` and ``report.html`` into ``config.out``.

    Returns the results and the first failure (None if all runs succeeded), on every rank. The order is by seed, then by
    strategy as listed. A run that fails does not stop the others: they are finished, recorded and reported.
    ``config.workers`` runs go in parallel. Each of them then gets a watcher of its own from ``watcher.add_run()``.
    """
    ranks = join_ranks() if ranks is None else ranks
    watcher = watcher if ranks.rank == 0 else SilentWatcher()
    check_same_options(config, ranks)
    ranks.run_on_all(_check_options, config, ranks.size)
    ranks.run_on_first(_check_folder, config)
    runs = [dataclasses.replace(run, resume=True) for run in config.runs()]  # their folders belong to us
    for run in runs:
        check(run, ranks)
    ranks.run_on_first(_begin, config, command)
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
                if run == runs[0] and not ranks.run_on_first(_has_begun, run):
                    raise outcome  # every strategy would fail alike, for example on a bad data folder
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_advice_of_all(runs) if ranks.rank == 0 else "") from None
    in_order = [results[run] for run in runs if run in results]
    failed = [failures[run] for run in runs if run in failures]
    ranks.run_on_first(_end, config, in_order, failed)
    return in_order, failed[0] if failed else None


def _one_after_another(
    runs: Sequence[Train], watcher: Watcher, command: str, ranks: Ranks
) -> Generator[tuple[Train, Outcome]]:
    """Like ``side_by_side``, but in this process and on all its ranks."""
    for run in runs:
        try:
            yield run, train(run, watcher, command, ranks)
        except EquipoiseError as error:
            if isinstance(error, LostRank) or (ranks.size > 1 and not is_shared(error)):
                raise  # the ranks no longer agree on what to do next
            watcher.end()
            yield run, error


def _num_workers(config: Compare, ranks: Ranks) -> int:
    if config.workers is not None:
        return config.workers
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
    if len(set(canonical)) < len(canonical):
        raise UsageError(
            f"--strategies must be different: got {', '.join(config.strategies)}. Remove the repeated ones."
        )


def _begin(config: Compare, command: str) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "compare.json", {"command": command, "options": _options(config)})


def _end(config: Compare, results: list[dict[str, Any]], failures: list[EquipoiseError]) -> None:
    write_json(config.out / "results.json", results)
    if any(map(_has_begun, config.runs())):
        try:
            write_report(config.out)
        except EquipoiseError:
            if not failures:
                raise  # after a failed run it is only a consequence


def _has_begun(run: Train) -> bool:
    return (run.out / "config.json").exists()


def _options(config: Compare) -> dict[str, Any]:
    return {**config.shared(), "strategies": list(config.strategies), "seeds": config.seeds}


def _check_folder(config: Compare) -> None:
    out: Path = config.out
    if out.exists() and not out.is_dir():
        raise EquipoiseError(f"--out must be a folder: {out} is a file. Choose another.")
    if is_new(out):
        return
    names = sorted(path.name for path in out.iterdir())
    if not config.resume:
        raise EquipoiseError(
            f"--out must be new or empty: {out} holds {', '.join(names[:3])}{' ...' if names[3:] else ''}. Nothing was "
            "changed. Choose another folder, or continue a stopped comparison with --resume."
        )
    if "compare.json" not in names:
        raise EquipoiseError(
            f"--resume needs the folder of a comparison: {out} has no compare.json. Give the folder that was passed as "
            "--out, or leave --resume out and choose a new folder."
        )
    options = config.recorded(read_json(out / "compare.json", Comparison)["options"])
    dropped = [s for s in options["strategies"] if s not in config.strategies]
    if dropped or config.seeds < options["seeds"]:
        raise EquipoiseError(
            "a resumed comparison must keep its strategies and seeds: "
            f"{out} has {', '.join(options['strategies'])} with --seeds {options['seeds']}; "
            f"got {', '.join(config.strategies)} with --seeds {config.seeds}. Nothing was changed. "
            "Strategies and seeds may be added, but not removed."
        )
    for name, value in config.shared().items():
        if options.get(name) != value:
            raise EquipoiseError(
                f"a resumed comparison must keep its options: {out} has {name}={options.get(name)!r}, got {value!r}. "
                "Nothing was changed. Give the same options, or choose another folder."
            )
    for run in config.runs():
        if not is_new(run.out):
            Run(run.out)  # raises now if it is damaged, before anything is trained
