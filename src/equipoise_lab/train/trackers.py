"""What trackers get of a run: its metrics at each step, its evaluations and its result, while it trains.

    steps         train/loss, train/learning_rate, ...; equipoise/maxvio_batch, ... as the Trainer's callback logs them
    layers        layers/maxvio_batch/layer_3, layers/dead_experts/layer_3, ..., with --tracker-layers
    evaluations   selection/val_nats, ...
    result        result/val_nats, ...

The run folder has all of this too, and stays the record. So a tracker that fails never stops a run: it is named once,
and what it lacks is sent when the run is resumed. ``trackers.json`` in the folder says which run of a tracker is this
one, and what it has. A step that a resumed run trains again is not sent again.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, final

import torch

from equipoise.errors import EquipoiseError
from equipoise.metrics import dead_experts, max_violation
from equipoise_lab.analysis.summary import COLUMNS
from equipoise_lab.records import Run, TrackerRuns, read_json, write_json
from equipoise_lab.train.config import Train
from equipoise_lab.train.tracker_kinds import Place, finish, quiet, start

__all__ = [
    "FILE",
    "Trackers",
    "evaluation_metrics",
    "trackers_behind",
    "layer_metrics",
    "result_metrics",
    "step_metrics",
]

FILE = "trackers.json"
TRAINING_FIGURES = ("loss", "balancing_loss", "grad_norm", "learning_rate", "tokens")  # the rest is of the balancing
FACTS = ("strategy", "seed", "num_parameters", "num_active_parameters", "num_experts", "experts_per_token", "dtype")
RESULT = tuple(column.key for column in COLUMNS)  # as in the table


def step_metrics(row: Mapping[str, Any], tokens_per_second: float, num_alerts: int) -> dict[str, float]:
    """``row``: of steps.jsonl. ``num_alerts``: problems that exist, each counted in every layer that has it."""
    values = {f"train/{name}": row[name] for name in TRAINING_FIGURES if name in row}
    values["train/tokens_per_second"] = tokens_per_second
    values |= {
        f"equipoise/{name}": value
        for name, value in row.items()
        if name not in (*TRAINING_FIGURES, "step", "seconds", "strategy", "alerts")
    }
    values["equipoise/alerts"] = num_alerts
    return _numbers(values)


def evaluation_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation on the selection text. That on the test text is in the result."""
    return _numbers({f"{row['split']}/{name}": value for name, value in row.items()})


def result_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    return _numbers({f"result/{name}": result[name] for name in RESULT})


def layer_metrics(layers: Sequence[str], load: Sequence[Sequence[int]], most: int) -> dict[str, float]:
    """MaxVio and dead experts of at most ``most`` layers, which lie evenly over the depth, the first and the last too.

    >>> list(layer_metrics(["model.layers.1.mlp", "model.layers.2.mlp"], [[3, 1], [2, 2]], most=1))
    ['layers/maxvio_batch/layer_1', 'layers/dead_experts/layer_1']
    """
    most = min(most, len(layers))
    chosen = [round(i * (len(layers) - 1) / max(most - 1, 1)) for i in range(most)]
    numbers = [re.findall(r"\d+", name) for name in layers]
    is_by_number = all(len(one) == 1 for one in numbers) and len({one[0] for one in numbers}) == len(layers)
    names = [one[0] for one in numbers] if is_by_number else [str(index) for index in range(len(layers))]
    width = max(map(len, names))
    loads = {f"layer_{names[index]:0>{width}}": torch.tensor(load[index]) for index in chosen}
    return {f"layers/maxvio_batch/{name}": float(max_violation(counts)) for name, counts in loads.items()} | {
        f"layers/dead_experts/{name}": float(dead_experts(counts)) for name, counts in loads.items()
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


class _Speaker(Protocol):
    def say(self, text: str) -> None: ...


@final
class Trackers:
    """The trackers of a run, on rank 0. They start with the first step: until then the folder counts as new."""

    def __init__(self, config: Train, watcher: _Speaker):
        self.config, self.watcher = config, watcher
        self.path: Path = config.out / FILE
        self._waiting = list(config.trackers)
        self._trackers: dict[str, Any] = {}
        self._runs: dict[str, Any] = {}  # by tracker, the content of trackers.json
        self._sent: dict[str, dict[str, int]] = {}  # by tracker, the last step that it has
        self._is_complete = False

    def begin(self, records: Run, done: int, recorded: Mapping[str, int]) -> None:
        """The run continues after step ``done``.

        ``recorded``: the last step and the last evaluation in its logs, which may be later ones.
        """
        try:
            self._runs = dict(read_json(self.path, TrackerRuns)) if self.path.exists() else {}
        except EquipoiseError:
            if self._waiting:
                raise
        killed = [name for name, run in self._runs.items() if run.get("sent") is None]
        for name in killed:  # also those that are left out now: later there will be more records than they got
            self._runs[name] = {**self._runs[name], "sent": dict(recorded)}
        if killed:
            write_json(self.path, self._runs)
        if not self._waiting:
            return
        self.records = records
        for name in self._waiting:
            sent = {"steps": 0, "evaluations": 0}
            if name in self._runs:
                sent = dict(self._runs[name]["sent"])
            if name == "tensorboard":  # it can forget
                sent = {log: min(step, done) for log, step in sent.items()}
            self._sent[name] = sent

    def step(
        self, row: Mapping[str, Any], load: Sequence[Sequence[int]], tokens_per_second: float, num_alerts: int
    ) -> None:
        """``num_alerts``: as in ``step_metrics``."""
        if not self._waiting and not self._trackers:
            return
        values = step_metrics(row, tokens_per_second, num_alerts)
        if self.config.tracker_layers:
            values |= layer_metrics(self.records.config["layers"], load, self.config.tracker_layers)
        self._log("steps", row["step"], values)

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        if row.get("split") != "test":
            self._log("evaluations", step, evaluation_metrics(row))

    def result(self, result: Mapping[str, Any]) -> None:
        self._log(None, self.config.steps, result_metrics(result))
        self._is_complete = True

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                finish(name, tracker, is_complete=self._is_complete)
            except Exception as error:
                self.watcher.say(f"{name} may lack the last steps of {self.config.out}: {_reason(error)}")
            self._runs[name] = {**self._runs[name], "sent": self._sent[name]}
        if self._trackers:
            write_json(self.path, self._runs)
        self._trackers = {}

    def _log(self, log: str | None, step: int, values: dict[str, float]) -> None:
        """``log``: which log of the run folder the values are of; None: of none."""
        self._start()
        for name, tracker in list(self._trackers.items()):
            sent = self._sent[name]
            if log is not None and step <= sent[log]:
                continue
            try:
                with quiet():
                    tracker.log(values, step=step)
            except Exception as error:
                self._give_up(name, f"at step {step}", error)
                continue
            if log is not None:
                sent[log] = step

    def _start(self) -> None:
        waiting, self._waiting = self._waiting, []
        for name in waiting:
            sent = self._sent[name]
            place = Place(self.config.out, self._runs.get(name, {}).get("id"), sent["steps"])
            try:
                self._trackers[name], run_id = start(
                    name, place, self._configuration(), [f"result/{key}" for key in RESULT]
                )
            except Exception as error:
                self._give_up(name, "at its start", error)
                continue
            if name == "wandb" and not self._trackers[name].tracker.offline:
                self.watcher.say(f"wandb: {self._trackers[name].tracker.url}")
            # Null until the session ends. If it is killed, we assume that the tracker got all that is recorded.
            self._runs[name] = {"id": run_id, "sent": None}
            write_json(self.path, self._runs)

    def _give_up(self, name: str, when: str, error: Exception) -> None:
        if (tracker := self._trackers.pop(name, None)) is not None:
            with suppress(Exception):  # one that stays open would get the metrics of the next run
                finish(name, tracker, is_complete=False)
        if name in self._runs:
            self._runs[name] = {**self._runs[name], "sent": self._sent[name]}
            write_json(self.path, self._runs)
        self.watcher.say(
            f"{name} failed {when} and gets nothing more of this run: {_reason(error)}. Training goes on; "
            f"{self.config.out} has every step. After a stop, --resume sends what is missing."
        )

    def _configuration(self) -> dict[str, Any]:
        facts = {name: self.records.config.get(name) for name in FACTS}
        facts |= {"num_layers": len(self.records.config["layers"]), "out": str(self.config.out)}
        values = {**self.records.config.get("options", {}), **facts}
        return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


def trackers_behind(config: Train) -> list[str]:
    """The trackers of ``config`` that lack steps of its run, which is complete."""
    runs = dict(read_json(config.out / FILE, TrackerRuns)) if config.trackers and (config.out / FILE).exists() else {}
    sent = {name: (run.get("sent") or {"steps": config.steps})["steps"] for name, run in runs.items()}
    return [name for name in config.trackers if sent.get(name, 0) < config.steps]


def _reason(error: Exception) -> str:
    """On one line: some of these errors are long.

    >>> _reason(ValueError("no server.\\nSee below"))
    'ValueError: no server'
    """
    lines = str(error).strip().splitlines() or [""]
    return textwrap.shorten(f"{type(error).__name__}: {lines[0]}", 200, placeholder=" ...").rstrip(".: ")
