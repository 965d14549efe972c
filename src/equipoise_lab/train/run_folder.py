"""Writes the folder of a run. Only rank 0 has the folder, so only rank 0 may call what is here.

corpus, model and balance  ->  facts  ->  config.json
steps and evaluations      ->  rows   ->  *.jsonl
the last evaluation        ->  audit.json and result.json
"""

import math
import os
import platform
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, final

import torch

from equipoise.alerts import Alert, Alerts
from equipoise.errors import EquipoiseError
from equipoise_lab.experts.result import RESULT, AuditData, summarise
from equipoise_lab.records import LOCK, Run, is_new, write_json
from equipoise_lab.train.checkpoint import CHECKPOINTS
from equipoise_lab.train.config import Train
from equipoise_lab.train.config_file import write_config_file
from equipoise_lab.train.data import Corpus
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.location import PLACES, is_same_place
from equipoise_lab.train.selection import evaluation_note, tokens_choose_in_evaluation
from equipoise_lab.train.switch import has_positive_rate
from equipoise_lab.train.trackers import Trackers, trackers_behind

KEPT = ("strategy", "seed", "steps", "layers", "domains", "num_experts", "experts_per_token", "num_parameters")
AVERAGED = ("loss", "maxvio_batch", "maxvio_micro", "seconds")  # numbers of a step that the result needs

__all__ = ["FolderLock", "RunFolder", "SilentWatcher", "Watcher", "complete_result", "resume_options"]


class Watcher(Protocol):
    """Receives the progress of a run."""

    def say(self, text: str) -> None: ...

    def begin(self, config: Train, done: int) -> None: ...

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None: ...

    def end(self) -> None: ...


class SilentWatcher:
    """Ignores the progress of a run. Every rank but rank 0 has this watcher."""

    def say(self, text: str) -> None: ...

    def begin(self, config: Train, done: int) -> None: ...

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None: ...

    def end(self) -> None: ...

    def add_run(self) -> "SilentWatcher":
        return self


def complete_result(config: Train, watcher: Watcher) -> dict[str, Any] | None:
    """The result of a run that is already complete, else None."""
    if is_new(config.out) or not Run(config.out).complete:
        return None
    _check_same_options(Run(config.out), config)
    watcher.begin(config, config.steps)
    if config.save_model and not (config.out / "model").is_dir():
        watcher.say(f"{config.out} is complete, but was trained with --no-save-model: there is no model to save")
    for name in trackers_behind(config):
        watcher.say(f"{name} lacks steps of {config.out}, which is complete: nothing more is sent")
    watcher.end()
    # Checkpoints remain if the run was killed after its result was written.
    shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
    return Run(config.out).result


class FolderLock:
    """Locks a folder against other training processes, until it is released or the process ends.

    Raises EquipoiseError if another process holds the lock.
    """

    descriptor: int | None = None

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK
        try:  # a link would lead to a file that is not ours to write
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
        except OSError as error:
            raise EquipoiseError(f"A lock must be a file: {self.path}: {error.strerror}. Remove it.") from None
        try:
            import fcntl

            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            holder = self.path.read_text(encoding="utf-8", errors="replace")
            raise EquipoiseError(
                f"only one process may train in a folder: {folder} is in use by {holder}. Wait for it, stop it, or "
                "choose another folder."
            ) from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            return
        os.truncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {platform.node()}".encode())

    def release(self) -> None:
        if self.descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None


def resume_options(config: Train) -> dict[str, Any]:
    """The options that must stay the same when a run is resumed."""
    return {**config.shared(), "strategy": config.strategy, "seed": config.seed}


def _check_same_options(records: Run, config: Train) -> None:
    recorded = config.recorded(records.config.get("options", {}))
    for name, value in resume_options(config).items():
        if recorded.get(name) != value and not (name in PLACES and is_same_place(recorded.get(name), value)):
            raise EquipoiseError(
                f"a resumed run must keep its options: {config.out} has {name}={recorded.get(name)!r}, got {value!r}. "
                "Give the same options, or choose another folder."
            )


@final
class RunFolder:
    """The folder of one run, from its first step or its last checkpoint to its result."""

    records: Run

    def __init__(self, config: Train, watcher: Watcher):
        self.config, self.watcher = config, watcher
        self.tokens_per_step = config.micro_batches * config.sequences * config.sequence_length
        self.seconds: list[float] = []  # duration of every step
        self.alerts = Alerts(num_steps=config.steps)
        self.trackers = Trackers(config, watcher)
        self._lock: FolderLock | None = None

    @property
    def checkpoints(self) -> Path:
        return self.config.out / CHECKPOINTS

    def open(self, facts: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
        """Creates the folder with these facts, or opens an existing one. Returns whether the run uses bfloat16.

        ``facts`` stay the same when a run is resumed. ``machine`` may change; the watcher then reports it.
        """
        self._lock = FolderLock(self.config.out)
        try:
            return self._open(facts, machine)
        except BaseException:  # not in __del__: exceptions there, for example from a signal handler, are lost
            self.release()
            raise

    def _open(self, facts: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
        config = self.config
        if is_new(config.out):
            self.records = Run.create(config.out, {**facts, **machine})
            write_config_file(config)
        else:
            if not config.resume:
                raise EquipoiseError(
                    f"--out must be new or empty: another run has started in {config.out}. Choose another folder."
                )
            self.records = Run(config.out)
            _check_same_options(self.records, config)
            self.records.require("dtype", "notes", "corpus_fingerprint", *KEPT)
            if self.records.config["corpus_fingerprint"] != facts["corpus_fingerprint"]:
                raise EquipoiseError(
                    f"a resumed run must keep its text: the text of {config.out} has changed. Restore the text, or "
                    "choose another folder."
                )
            for name in KEPT:
                if self.records.config[name] != facts[name]:
                    raise EquipoiseError(
                        f"a resumed run must keep its {name}: {self.records.path / 'config.json'} has "
                        f"{self.records.config[name]!r}, this run has {facts[name]!r}. Restore the file, install the "
                        "versions that it names, or choose another folder."
                    )
            recorded = {"wrapper": "none", "num_ranks": 1, **self.records.config}
            changed = [
                name.replace("num_ranks", "number of ranks") for name in machine if recorded.get(name) != machine[name]
            ]
            if changed:
                self.watcher.say(f"{' and '.join(changed)} changed since {config.out} was created: numbers may differ")
        return self.records.config["dtype"] == "bfloat16"  # not this machine's choice: "auto" may differ

    def release(self) -> None:
        """Closes the trackers, and unlocks the folder for other processes."""
        self.trackers.close()
        if self._lock is not None:
            self._lock.release()

    def begin(self, done: int) -> None:
        """Continues the records after step ``done``, the step of the checkpoint."""
        records = self.records
        for log in ("steps", "loads"):
            steps = [row["step"] for row in records.rows(log) if row["step"] <= done]
            if steps != list(range(1, done + 1)):
                raise EquipoiseError(
                    f"a resumed run needs the records of all {done} steps before its checkpoint: {records.path / log}"
                    f".jsonl has {len(steps)}. Restore the file, or remove the newest checkpoint in {self.checkpoints}."
                )
        for row in records.rows("steps"):
            if row["step"] <= done and any(row.get(name) is None for name in AVERAGED):
                raise EquipoiseError(
                    f"{records.path / 'steps.jsonl'} must contain {', '.join(AVERAGED)} of every step: step "
                    f"{row['step']} lacks some. Restore the file, or remove the run's folder and train again."
                )
        recorded = {log: max((row["step"] for row in records.rows(log)), default=0) for log in ("steps", "evaluations")}
        records.rewind(done)
        self.watcher.begin(self.config, done)
        for note in records.config["notes"]:
            self.watcher.say(note)
        self.trackers.begin(records, done, recorded)
        evaluations = {row["step"]: row for row in records.rows("evaluations")}
        for row, load in zip(records.rows("steps"), records.rows("loads"), strict=True):
            self.seconds.append(row["seconds"])
            self._new_alerts(row["step"], load["load"])
            self._track(row, load["load"])
            if row["step"] in evaluations:
                self.trackers.evaluation(row["step"], evaluations[row["step"]])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / statistics.median(self.seconds[-20:])

    def _track(self, row: dict[str, Any], load: list[list[int]]) -> None:
        num_alerts = sum(map(len, self.alerts.holding.values()))
        self.trackers.step(row, load, self.tokens_per_second, num_alerts)

    def _new_alerts(self, step: int, load: list[list[int]]) -> list[Alert]:
        """The alerts that start or end with this step."""
        self.alerts.strategy = self.config.strategy_of(step)
        self.alerts.steers = has_positive_rate(self.alerts.strategy, step - 1)
        layers = self.records.config["layers"]
        return self.alerts.see(dict(zip(layers, map(torch.tensor, load), strict=True)))

    def step(self, row: dict[str, Any], load: list[list[int]]) -> None:
        """Records a step. Then raises EquipoiseError if its loss is not finite."""
        config, records = self.config, self.records
        self.seconds.append(row["seconds"])
        alerts = self._new_alerts(row["step"], load)
        if alerts:
            row = {**row, "alerts": [str(alert) for alert in alerts]}
        records.append("steps", row)
        records.append("loads", {"step": row["step"], "load": load})
        for alert in alerts:
            if alert.first:  # later ones are in the records and, while they last, in the progress line
                self.watcher.say(f"step {row['step']}: {alert}")
        shown = {**row, "holding": self.alerts.mark} if self.alerts.mark else row
        self.watcher.step(shown, self.tokens_per_second)
        self._track(row, load)
        if not math.isfinite(row["loss"]):
            raise EquipoiseError(
                f"training must not diverge: the loss of {config.label}, seed {config.seed}, is {row['loss']} "
                f"at step {row['step']}. The records are in {records.path}. Use a lower --learning-rate."
            )

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        self.records.append("evaluations", {"step": step, **row})
        self.trackers.evaluation(step, row)

    def audit(self, audited: AuditData, corpus: Corpus, model_type: str) -> None:
        """Writes what the experts did in the last evaluation, in the format of `equipoise audit`."""
        config = self.config
        if not tokens_choose_in_evaluation(config.selection):
            self.watcher.say(f"no {RESULT}: with --selection {config.selection} experts choose tokens")
            return
        levels = levels_of(config.data, {domain: corpus.sample(domain) for domain in corpus.domains})
        audit = summarise(audited, corpus.decoder(), levels)
        source = f"counted in the run's last evaluation, on {sum(audit['tokens'].values()):,} tokens of its test text"
        selection = evaluation_note(config.selection)
        audit |= {
            "model": str(config.out),
            "model_type": model_type,
            "num_parameters": self.records.config["num_parameters"],
            "data": config.data,
            "notes": [source, *([selection] if selection else []), *audit["notes"]],
        }
        write_json(self.records.path / RESULT, audit)

    def sync(self) -> None:
        self.records.sync()

    def finish(self, selection: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """Writes the result of the run and returns it.

        ``selection`` and ``row`` are the last evaluations, on the selection text and the test text. ``train_nats``,
        ``maxvio_batch`` and ``maxvio_micro`` are means over the last tenth of the steps. ``alerts`` holds the alerts
        that are still active: the experts, by kind and layer.
        """
        config, records = self.config, self.records
        last = list(records.rows("steps"))[-max(1, config.steps // 10) :]
        result = {
            "strategy": config.label,
            "seed": config.seed,
            "steps": config.steps,
            "tokens": config.steps * self.tokens_per_step,
            **{name: row[name] for name in ("val_nats", "val_perplexity", "val_bits_per_byte", "maxvio_global")},
            "maxvio_floor": row["maxvio_floor"],
            **{name: sum(step[name] for step in last) / len(last) for name in ("maxvio_batch", "maxvio_micro")},
            **{
                name: row[name]
                for name in ("domain_information_bits", "max_domain_share", "topk_score_sum", "dead_experts")
            },
            "train_nats": sum(step["loss"] for step in last) / len(last),
            "selection_nats": selection["val_nats"],
            "selection_maxvio": selection["maxvio_global"],
            "tokens_per_second": self.tokens_per_step / statistics.median(self.seconds),
            "domains": {
                name: {"nats": domain["nats"], "bits_per_byte": domain["bits_per_byte"]}
                for name, domain in row["domains"].items()
            },
        }
        if self.alerts.holding:
            result["alerts"] = self.alerts.holding
        records.finish(result)
        self.trackers.result(result)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # the run is complete and its model saved
        return records.result
