"""The main job: the same model under several strategies, side by side."""

import dataclasses
from pathlib import Path
from typing import Any

from equipoise.balancers import format_strategy
from equipoise.errors import EquipoiseError, UsageError
from equipoise.lab.balancers import parse_lab_strategy
from equipoise.lab.config import Compare, Train
from equipoise.lab.ranks import LostRank, Ranks, is_shared, meet
from equipoise.lab.run_folder import Nobody, Watcher
from equipoise.lab.train import check, same_options, train
from equipoise.records import Run, is_new, read_json, write_json
from equipoise.report import write_report

__all__ = ["compare"]


def compare(
    config: Compare, watcher: Watcher, command: str = "", ranks: Ranks | None = None
) -> tuple[list[dict[str, Any]], EquipoiseError | None]:
    """Trains every strategy and seed, and writes ``results.json`` and ``report.html`` into ``config.out``.

    Returns the results, seeds first, strategies in the order given, and the first failure, on every rank. A run that
    fails does not stop the others: they are finished, recorded and reported.
    """
    ranks = meet() if ranks is None else ranks
    watcher = watcher if ranks.rank == 0 else Nobody()
    same_options(config, ranks)
    ranks.together(_check_options, config)
    ranks.first(_check_folder, config)
    runs = config.runs()
    for run in runs:
        check(dataclasses.replace(run, resume=True), ranks)  # its folder is ours; the options are what is checked
    ranks.first(_begin, config, command)
    results, failures = [], []
    for run in runs:
        try:
            results.append(train(dataclasses.replace(run, resume=True), watcher, command, ranks))
        except EquipoiseError as error:
            if isinstance(error, LostRank) or (ranks.size > 1 and not is_shared(error)):
                raise  # the ranks no longer act as one
            watcher.say(f"{run.label}, seed {run.seed}: {error}")
            failures.append(error)
            if not results and len(failures) == 1 and not ranks.first(_began, run):
                raise  # nothing of it depends on the strategy: a bad data folder, say
    ranks.first(_end, config, results, failures)
    return results, failures[0] if failures else None


def _check_options(config: Compare) -> None:
    config.check()
    plain = [format_strategy(parse_lab_strategy(strategy)) for strategy in config.strategies]
    if len(set(plain)) < len(plain):
        raise UsageError(f"--strategies must be different: got {', '.join(config.strategies)}. Leave the repeated out.")


def _begin(config: Compare, command: str) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "compare.json", {"command": command, "options": _options(config)})


def _end(config: Compare, results: list[dict[str, Any]], failures: list[EquipoiseError]) -> None:
    write_json(config.out / "results.json", results)
    if any(map(_began, config.runs())):
        try:
            write_report(config.out)
        except EquipoiseError:
            if not failures:
                raise  # else it only follows from them


def _began(run: Train) -> bool:
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
            "touched. Choose another folder, or go on with a comparison that was stopped with --resume."
        )
    if "compare.json" not in names:
        raise EquipoiseError(
            f"--resume must name the folder of a comparison: {out} has no compare.json. Choose the folder that was "
            "passed as --out, or leave --resume out and choose a new one."
        )
    there = config.recorded(read_json(out / "compare.json")["options"])
    dropped = [s for s in there["strategies"] if s not in config.strategies]
    if dropped or config.seeds < there["seeds"]:
        raise EquipoiseError(
            f"a comparison goes on with all that it has: {out} has {', '.join(there['strategies'])}, seeds "
            f"{there['seeds']}; got {', '.join(config.strategies)}, seeds {config.seeds}. Nothing was touched. "
            "Strategies and seeds may be added, not left out."
        )
    for name, value in config.shared().items():
        if there.get(name) != value:
            raise EquipoiseError(
                f"a comparison goes on with the options that it began with: {out} has {name}={there.get(name)!r}, got "
                f"{value!r}. Nothing was touched. Give the same options, or choose another folder."
            )
    for run in config.runs():
        if not is_new(run.out):
            Run(run.out)  # a damaged one is an error before anything is trained
