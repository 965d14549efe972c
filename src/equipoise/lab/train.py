"""One run: trains one model under one strategy and writes its run folder.

corpus -> micro-batches -> forwards of a window -> one backward -> optimizer -> balance.step() -> records
"""

import datetime
import importlib.metadata
import math
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from equipoise import __version__
from equipoise.attachment import OFFSETS_FILE, attach
from equipoise.balance import Balance
from equipoise.balancers import parse_strategy
from equipoise.errors import EquipoiseError
from equipoise.lab import checkpoint
from equipoise.lab.batches import Batches
from equipoise.lab.config import Train
from equipoise.lab.data import Corpus, load_corpus
from equipoise.lab.engine import learning_rate_at, machine, reproducible
from equipoise.lab.evaluate import evaluate, language_model_loss
from equipoise.lab.models import build_model, num_active_parameters
from equipoise.records import Run, is_new
from equipoise.taps.families import find_routers

__all__ = ["Watcher", "train"]


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def say(self, text: str) -> None: ...

    def begin(self, config: Train, done: int) -> None: ...

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None: ...

    def end(self) -> None: ...


def check(config: Train) -> None:
    """Everything about a run that can be wrong before a model is built."""
    config.check()
    parse_strategy(config.strategy)
    out = config.out
    if out.exists() and not out.is_dir():
        raise EquipoiseError(f"--out must be a folder: {out} is a file. Choose another.")
    if not is_new(out) and not config.resume:
        raise EquipoiseError(
            f"--out must be new or empty: {out} holds {_some(out)}. Nothing was touched. Choose another folder, or "
            "go on with a run that was stopped with --resume."
        )


def _some(folder: Any) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def train(config: Train, watcher: Watcher, command: str = "") -> dict[str, Any]:
    """Trains one run and returns its result (the content of ``result.json``)."""
    check(config)
    if not is_new(config.out) and Run(config.out).complete:
        _same_options(Run(config.out), config)
        watcher.begin(config, config.steps)
        watcher.end()
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)  # killed before it could
        return Run(config.out).result
    with reproducible():
        return _Training(config, watcher, command).run()


def _same_options(records: Run, config: Train) -> None:
    there = {**records.config.get("options", {})}
    for name, value in _asked(config).items():
        if there.get(name) != value:
            raise EquipoiseError(
                f"a run goes on with the options that it began with: {config.out} has "
                f"{name}={there.get(name)!r}, got {value!r}. Give the same options, or choose another folder."
            )


def _asked(config: Train) -> dict[str, Any]:
    return {**config.shared(), "strategy": config.strategy, "seed": config.seed}


class _Training:
    def __init__(self, config: Train, watcher: Watcher, command: str):
        self.config, self.watcher = config, watcher
        self.device, self.autocast = machine(config.dtype)
        self.corpus: Corpus = load_corpus(
            None if config.data == "corpus" else config.data,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            progress=watcher.say,
            sequence_length=config.sequence_length,
        )
        self.batches = Batches(
            self.corpus,
            sequence_length=config.sequence_length,
            sequences_per_micro_batch=config.sequences,
            micro_batches_per_step=config.micro_batches,
            seed=config.seed,
            shuffled=config.shuffled,
        )
        self.model: nn.Module = build_model(config, self.corpus.vocab_size).to(self.device).train()
        self.balance: Balance = attach(self.model, config.strategy, offsets=self._saved_offsets())
        self.k: int = self.model.config.num_experts_per_tok  # type: ignore[assignment]
        self.num_experts = len(next(iter(self.balance.offsets.values())))
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.dim() >= 2]
        other = [p for p in self.model.parameters() if p.requires_grad and p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.records = self._open_records(command)

    def _saved_offsets(self) -> Path | None:
        """The offsets that lie beside the weights of --model, where its family has no slot for them."""
        if self.config.model is None or not (self.config.model / OFFSETS_FILE).exists():
            return None
        if any(balancer.has_offset for balancer in parse_strategy(self.config.strategy)):
            return self.config.model
        self.watcher.say(f"{self.config.strategy} holds no offsets: those beside {self.config.model} are left out")
        return None

    def _open_records(self, command: str) -> Run:
        config = self.config
        if not is_new(config.out):
            records = Run(config.out)
            _same_options(records, config)
            if records.config["corpus_fingerprint"] != self.corpus.fingerprint:
                raise EquipoiseError(
                    f"a run goes on with the text that it began with: the text of {config.out} changed."
                )
            self.autocast = records.config["dtype"] == "bfloat16"  # "auto" may mean another on this machine
            changed = [name for name, value in self._machine().items() if records.config.get(name) != value]
            if changed:
                self.watcher.say(f"{' and '.join(changed)} changed since {config.out} began: numbers may differ")
            return records
        return Run.create(
            config.out,
            {
                "strategy": config.strategy,
                "seed": config.seed,
                "arch": config.arch if config.model is None else self.model.config.model_type,
                "steps": config.steps,
                "options": _asked(config),
                "num_parameters": sum(p.numel() for p in self.model.parameters()),
                "num_active_parameters": num_active_parameters(self.model, self.k, self.num_experts),
                "gate": find_routers(self.model)[0][2].gate,
                "num_experts": self.num_experts,
                "experts_per_token": self.k,
                "layers": list(self.balance.offsets),
                "domains": list(self.corpus.domains),
                "data": config.data,
                "corpus_fingerprint": self.corpus.fingerprint,
                "vocab_size": self.corpus.vocab_size,
                "sequence_length": config.sequence_length,
                "sequences_per_micro_batch": config.sequences,
                "micro_batches_per_step": config.micro_batches,
                "learning_rate": config.learning_rate,
                "shuffled": config.shuffled,
                "order": config.order,
                "wrapper": "none",  # one process
                "dtype": "bfloat16" if self.autocast else "float32",
                "command": command,
                "began": datetime.datetime.now(datetime.UTC).isoformat(),
                "notes": self.balance.notes(config.steps),
                **self._machine(),
            },
        )

    def _machine(self) -> dict[str, Any]:
        names = ("torch", "transformers", "tokenizers", "numpy")
        return {
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": {
                "equipoise": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in names},
            },
        }

    def run(self) -> dict[str, Any]:
        records, config = self.records, self.config
        facts = checkpoint.load_newest(
            records.path / "checkpoints", self.model, self.optimizer, self.balance, self.watcher.say
        )
        done = 0 if facts is None else facts["step"]
        for log in ("steps", "loads"):
            there = [row["step"] for row in records.rows(log) if row["step"] <= done]
            if there != list(range(1, done + 1)):
                raise EquipoiseError(
                    f"A run goes on with the records of every step before its checkpoint: {records.path / log}.jsonl "
                    f"holds {len(there)} of {done}. Restore it, or remove the newest of {records.path / 'checkpoints'}."
                )
        records.rewind(done)
        self.watcher.begin(config, done)
        for note in records.config["notes"]:
            self.watcher.say(note)
        seconds = [row["seconds"] for row in records.rows("steps")]
        for step in range(done, config.steps):
            row = self._step(step)
            seconds.append(row["seconds"])
            records.append("steps", row)
            records.append("loads", {"step": step + 1, "load": [load.tolist() for load in self.balance.load.values()]})
            self.watcher.step(row, self._tokens_per_step / statistics.median(seconds[-20:]))
            if not math.isfinite(row["loss"]):
                raise EquipoiseError(
                    f"training must not diverge: the loss of {config.strategy}, seed {config.seed}, is {row['loss']} "
                    f"at step {step + 1}. Its records are kept in {records.path}; take a lower --learning-rate."
                )
            last = step + 1 == config.steps
            if config.evaluate_every and (step + 1) % config.evaluate_every == 0 and not last:
                records.append("evaluations", {"step": step + 1, **self._evaluate("selection")})
            if (step + 1) % config.checkpoint_every == 0 and not last:
                records.sync()
                checkpoint.save(records.path / "checkpoints", step + 1, self.model, self.optimizer, self.balance)
        result = self._finish(seconds)
        self.watcher.end()
        return result

    @property
    def _tokens_per_step(self) -> int:
        return self.config.micro_batches * self.config.sequences * self.config.sequence_length

    def _step(self, step: int) -> dict[str, Any]:
        config, started = self.config, time.perf_counter()
        rate = learning_rate_at(step, steps=config.steps, peak=config.learning_rate, warmup=config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        window = self.batches.window(step)
        losses, task, balancing = [], torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for micro_batch in window:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = language_model_loss(self.model, micro_batch.input_ids.to(self.device))
            ticket = self.balance.loss()
            task, balancing = task + loss.detach(), balancing + ticket.detach()
            loss = (loss + ticket) / len(window)  # equally many tokens in each
            if config.order == "interleaved":
                loss.backward()
            else:
                losses.append(loss)
        if losses:
            torch.stack(losses).sum().backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balance.step()
        figures = self.balance.metrics()
        return {
            "step": step + 1,
            "loss": float(task) / len(window),
            "balancing_loss": float(balancing) / len(window),
            "grad_norm": float(norm),
            "learning_rate": rate,
            "tokens": (step + 1) * self._tokens_per_step,
            **{name: value for name, value in figures.items() if name != "tokens"},
            "seconds": time.perf_counter() - started,
        }

    def _evaluate(self, split: str) -> dict[str, Any]:
        return evaluate(
            self.model,
            self.balance,
            self.corpus,
            split=split,
            sequence_length=self.config.sequence_length,
            most_sequences=self.config.evaluation_sequences,
            sequences=self.config.sequences,
            k=self.k,
            device=self.device,
            autocast=self.autocast,
        )

    def _finish(self, seconds: list[float]) -> dict[str, Any]:
        config, records = self.config, self.records
        self.watcher.say("evaluating on the test text")
        row = self._evaluate("test")
        records.append("evaluations", {"step": config.steps, **row})
        if config.save_model:
            note = checkpoint.save_model(records.path / "model", self.model, self.balance, self.corpus.tokenizer_file)
            if note:
                self.watcher.say(note)
        last = [step["maxvio_batch"] for step in records.rows("steps")][-max(1, config.steps // 10) :]
        result = {
            "strategy": config.strategy,
            "seed": config.seed,
            "steps": config.steps,
            "tokens": config.steps * self._tokens_per_step,
            **{name: row[name] for name in ("val_nats", "val_perplexity", "val_bits_per_byte", "maxvio_global")},
            "maxvio_floor": row["maxvio_floor"],
            "maxvio_batch": sum(last) / len(last),
            "domain_information_bits": row["domain_information_bits"],
            "dead_experts": row["dead_experts"],
            "tokens_per_second": self._tokens_per_step / statistics.median(seconds),
            "domains": {
                name: {"nats": domain["nats"], "bits_per_byte": domain["bits_per_byte"]}
                for name, domain in row["domains"].items()
            },
        }
        records.finish(result)
        shutil.rmtree(records.path / "checkpoints", ignore_errors=True)  # the model is saved, the run is whole
        return records.result
