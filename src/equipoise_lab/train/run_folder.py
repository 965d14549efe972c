"""What a run leaves in its folder. Of many ranks the first alone has it: every method here is for that one to call.

corpus, model and balance -> facts -> config.json; steps and evaluations -> rows; the last evaluation -> audit.json and
result.json
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

from equipoise.alerts import Alerts
from equipoise.errors import EquipoiseError
from equipoise_lab.experts.result import RESULT, Audited, summarise
from equipoise_lab.records import LOCK, Run, is_new, write_json
from equipoise_lab.train.config import Train
from equipoise_lab.train.data import Corpus
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.selection import evaluates_by_token, evaluation_note
from equipoise_lab.train.switch import moves_by_rate

__all__ = ["Nobody", "RunFolder", "Watcher", "asked", "complete_result"]


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def say(self, text: str) -> None: ...

    def begin(self, config: Train, done: int) -> None: ...

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None: ...

    def end(self) -> None: ...


class Nobody:
    """The watcher of a rank other than the first."""

    def say(self, text: str) -> None: ...

    def begin(self, config: Train, done: int) -> None: ...

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None: ...

    def end(self) -> None: ...

    def another(self) -> "Nobody":
        return self


def complete_result(config: Train, watcher: Watcher) -> dict[str, Any] | None:
    """The result of a run that is complete already."""
    if is_new(config.out) or not Run(config.out).complete:
        return None
    _same_options(Run(config.out), config)
    watcher.begin(config, config.steps)
    if config.save_model and not (config.out / "model").is_dir():
        watcher.say(f"{config.out} is complete, and was trained with --no-save-model: no model is there to be saved")
    watcher.end()
    shutil.rmtree(config.out / "checkpoints", ignore_errors=True)  # killed before it could
    return Run(config.out).result


class _Hold:
    """Refuses a folder in which another process trains, and keeps others out until it is released or gone."""

    handle: int | None = None

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            import fcntl

            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.handle)
            raise EquipoiseError(
                f"one process may train in a folder: {folder} is held by {self.path.read_text(encoding='utf-8')}. Wait "
                "for it, stop it, or choose another folder."
            ) from None
        except (ImportError, OSError):  # Windows, a file system without locks
            return
        os.truncate(self.handle, 0)
        os.write(self.handle, f"process {os.getpid()} on {platform.node()}".encode())

    def release(self) -> None:
        if self.handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.handle)
            self.handle = None


def asked(config: Train) -> dict[str, Any]:
    """The options that a run must keep when it goes on."""
    return {**config.shared(), "strategy": config.strategy, "seed": config.seed}


def _same_options(records: Run, config: Train) -> None:
    there = config.recorded(records.config.get("options", {}))
    for name, value in asked(config).items():
        if there.get(name) != value:
            raise EquipoiseError(
                f"a run goes on with the options that it began with: {config.out} has "
                f"{name}={there.get(name)!r}, got {value!r}. Give the same options, or choose another folder."
            )


@final
class RunFolder:
    """The folder of one run, from its first step or its last checkpoint to its result."""

    records: Run

    def __init__(self, config: Train, watcher: Watcher):
        self.config, self.watcher = config, watcher
        self.tokens_per_step = config.micro_batches * config.sequences * config.sequence_length
        self.seconds: list[float] = []  # of every step
        self.alerts = Alerts(num_steps=config.steps)
        self._hold: _Hold | None = None

    @property
    def checkpoints(self) -> Path:
        return self.config.out / "checkpoints"

    def open(self, facts: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
        """Begins a folder with these facts, or opens the one that is there; whether its run is one in bfloat16.

        ``facts`` do not change when a run goes on, ``machine`` may: then the watcher says so.
        """
        self._hold = _Hold(self.config.out)
        try:
            return self._open(facts, machine)
        except BaseException:  # not by __del__: what is raised there, as by a signal, is lost
            self.release()
            raise

    def _open(self, facts: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
        config = self.config
        if is_new(config.out):
            self.records = Run.create(config.out, {**facts, **machine})
        else:
            if not config.resume:
                raise EquipoiseError(f"--out must be new or empty: {config.out} was begun meanwhile. Choose another.")
            self.records = Run(config.out)
            _same_options(self.records, config)
            if self.records.config["corpus_fingerprint"] != facts["corpus_fingerprint"]:
                raise EquipoiseError(
                    f"a run goes on with the text that it began with: the text of {config.out} changed."
                )
            there = {"wrapper": "none", "num_ranks": 1, **self.records.config}
            changed = [
                name.replace("num_ranks", "number of ranks") for name in machine if there.get(name) != machine[name]
            ]
            if changed:
                self.watcher.say(f"{' and '.join(changed)} changed since {config.out} began: numbers may differ")
        return self.records.config["dtype"] == "bfloat16"  # "auto" may mean another on this machine

    def release(self) -> None:
        """Lets others train here."""
        if self._hold is not None:
            self._hold.release()

    def begin(self, done: int) -> None:
        """Takes up the records of the steps before the checkpoint."""
        records = self.records
        for log in ("steps", "loads"):
            there = [row["step"] for row in records.rows(log) if row["step"] <= done]
            if there != list(range(1, done + 1)):
                raise EquipoiseError(
                    f"A run goes on with the records of every step before its checkpoint: {records.path / log}.jsonl "
                    f"holds {len(there)} of {done}. Restore it, or remove the newest of {self.checkpoints}."
                )
        records.rewind(done)
        self.watcher.begin(self.config, done)
        for note in records.config["notes"]:
            self.watcher.say(note)
        self.seconds = [row["seconds"] for row in records.rows("steps")]
        for row in records.rows("loads"):
            self._see(row["step"], row["load"])

    def _see(self, step: int, load: list[list[int]]) -> list[str]:
        """What begins or is over with this step."""
        self.alerts.steers = moves_by_rate(self.config.strategy_of(step), step - 1)
        layers = self.records.config["layers"]
        return [str(alert) for alert in self.alerts.see(dict(zip(layers, map(torch.tensor, load), strict=True)))]

    def step(self, row: dict[str, Any], load: list[list[int]]) -> None:
        """Writes a step; one whose loss is not finite is an error, after it is written."""
        config, records = self.config, self.records
        self.seconds.append(row["seconds"])
        alerts = self._see(row["step"], load)
        if alerts:
            row = {**row, "alerts": alerts}
        records.append("steps", row)
        records.append("loads", {"step": row["step"], "load": load})
        for alert in alerts:
            self.watcher.say(f"step {row['step']}: {alert}")
        shown = {**row, "holding": self.alerts.mark} if self.alerts.mark else row
        self.watcher.step(shown, self.tokens_per_step / statistics.median(self.seconds[-20:]))
        if not math.isfinite(row["loss"]):
            raise EquipoiseError(
                f"training must not diverge: the loss of {config.label}, seed {config.seed}, is {row['loss']} "
                f"at step {row['step']}. Its records are kept in {records.path}; take a lower --learning-rate."
            )

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        self.records.append("evaluations", {"step": step, **row})

    def audit(self, audited: Audited, corpus: Corpus, model_type: str) -> None:
        """Writes what the experts did in the last evaluation, in the format of `equipoise audit`."""
        config, there = self.config, self.records.config
        if not evaluates_by_token(config.selection):
            self.watcher.say(f"no {RESULT}: --selection {config.selection} gives experts tokens, not tokens experts")
            return
        levels = levels_of(config.data, {domain: corpus.sample(domain) for domain in corpus.domains})
        found = summarise(audited, corpus.decoder(), levels)
        about = f"counted in the run's last evaluation, on {sum(found['tokens'].values()):,} tokens of its test text"
        selection = evaluation_note(config.selection)
        found |= {
            "model": str(config.out),
            "model_type": model_type,
            "num_parameters": there["num_parameters"],
            "data": config.data,
            "notes": [about, *([selection] if selection else []), *found["notes"]],
        }
        write_json(self.records.path / RESULT, found)

    def sync(self) -> None:
        self.records.sync()

    def finish(self, selection: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """Writes the result of the run, whose last evaluations these are on the selection and the test text, and
        returns it. ``train_nats``, ``maxvio_batch`` and ``maxvio_micro`` are means over the last tenth of the steps;
        ``alerts`` are those that still hold, by kind and layer the experts."""
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
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # the model is saved, the run is whole
        return records.result
