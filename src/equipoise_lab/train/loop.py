"""One run: trains one model under one strategy and writes its run folder.

corpus -> micro-batches -> forwards of a window -> one backward -> optimizer -> balance.step() -> records

All that has to do with the run folder is done by rank 0, in ``ranks.first``: on another node it need not be there.
"""

import dataclasses
import datetime
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise import __version__
from equipoise.balance import Balance
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.find import find_routers
from equipoise.saved import BIASES_FILE
from equipoise_lab.experts.result import Audited
from equipoise_lab.records import is_new
from equipoise_lab.train import checkpoint
from equipoise_lab.train.balancers import attach_strategy, check_strategy
from equipoise_lab.train.batches import Batches
from equipoise_lab.train.config import Train
from equipoise_lab.train.data import Corpus, load_corpus
from equipoise_lab.train.engine import learning_rate_at, machine, reproducible
from equipoise_lab.train.evaluate import evaluate, language_model_loss
from equipoise_lab.train.levels import levels_of
from equipoise_lab.train.models import build_model, num_active_parameters
from equipoise_lab.train.ranks import ALONE, Ranks, meet
from equipoise_lab.train.run_folder import Nobody, RunFolder, Watcher, asked, complete_result
from equipoise_lab.train.selection import check_selection, install_selection
from equipoise_lab.train.stop import told
from equipoise_lab.train.switch import check_switch, holds_biases, switch
from equipoise_lab.train.wrappers import check_wrapper, copy_to_ranks, digest, find_wrapper, full, shard, synchronising

__all__ = ["same_options", "train"]


def check(config: Train, ranks: Ranks = ALONE) -> None:
    """Everything about a run that can be wrong before a model is built."""
    ranks.together(_check_options, config, ranks.size)
    ranks.first(_check_out, config)


def _check_options(config: Train, num_ranks: int) -> None:
    config.check()
    check_strategy(config, num_ranks)
    if config.then is not None:
        check_switch(config.strategy, config.then)
    check_selection(config)
    check_wrapper(config.wrapper, num_ranks)
    if config.micro_batches % num_ranks:
        next_multiple = -(-config.micro_batches // num_ranks) * num_ranks
        raise UsageError(
            "--micro-batches must be a multiple of the number of ranks, which share the micro-batches of a step: got "
            f"{config.micro_batches} on {num_ranks} ranks. Take {next_multiple}, or another number of ranks."
        )
    if config.micro_batches // num_ranks % config.balance_batch:
        raise UsageError(
            "--balance-batch must divide the micro-batches of a rank: got "
            f"{config.balance_batch} of {config.micro_batches // num_ranks} on each of {num_ranks} ranks."
        )


def _check_out(config: Train) -> None:
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


def train(config: Train, watcher: Watcher, command: str = "", ranks: Ranks | None = None) -> dict[str, Any]:
    """Trains one run and returns its result (the content of ``result.json``), on every rank.

    ``ranks`` are, by default, those that torchrun started (:func:`equipoise_lab.train.ranks.meet`).
    """
    ranks = meet() if ranks is None else ranks
    watcher = watcher if ranks.rank == 0 else Nobody()
    same_options(config, ranks)
    check(config, ranks)
    result = ranks.first(complete_result, config, watcher)
    if result is not None:
        return result
    with reproducible():
        with ranks.alive(lambda: "before the first step", lambda: "Start the same command again."):
            training = _Training(config, watcher, command, ranks)
        try:
            return training.run()
        finally:
            training.folder.release()


def same_options(config: Any, ranks: Ranks) -> None:
    """Refuses ranks that were started with different options; ``out`` is the first rank's business alone."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del options["out"]
    ranks.agree(
        {"command": type(config).__name__.lower(), **options},
        lambda name, value, rank, theirs: (
            f"every rank must be started with the same options: {name} is {value!r} on rank 0, {theirs!r} on rank "
            f"{rank}. Start every node with the same command; only --out may differ."
        ),
    )


def _another_text(name: str, value: Any, rank: int, theirs: Any) -> str:
    return (
        f"every rank must have the same text: rank 0 has the {name} {value}, rank {rank} has {theirs}. Copy the text "
        "and the tokenizer of --data and --tokenizer to every node."
    )


def _other_weights(name: str, value: Any, rank: int, theirs: Any) -> str:
    return (
        f"every rank must begin with the same {name}: those of rank {rank} are not those of rank 0. Copy --model to "
        "every node, and install the same versions there."
    )


class _Training:
    def __init__(self, config: Train, watcher: Watcher, command: str, ranks: Ranks = ALONE):
        self.config, self.watcher, self.ranks = config, watcher, ranks
        self.device, autocast = machine(config.dtype)
        self.autocast = all(ranks.gather(autocast))
        self.corpus: Corpus = ranks.by_node(self._load_corpus)
        ranks.agree({"fingerprint": self.corpus.fingerprint}, _another_text)
        ranks.first(levels_of, config.data, dict.fromkeys(self.corpus.domains, ""))  # an error now, not at the end
        self.batches = Batches(
            self.corpus,
            sequence_length=config.sequence_length,
            sequences_per_micro_batch=config.sequences,
            micro_batches_per_step=config.micro_batches // ranks.size,
            seed=config.seed,
            shuffled=config.shuffled,
            balance_batch=config.balance_batch,
            rank=ranks.rank,
            num_ranks=ranks.size,
        )
        self.inner: nn.Module = ranks.together(build_model, config, self.corpus.vocab_size)
        if ranks.size > 1:
            ranks.agree({"weights": digest(self.inner)}, _other_weights)
        ranks.together(install_selection, self.inner, config.selection)
        self.inner = self.inner.to(self.device).train()
        wrapper = check_wrapper(config.wrapper, ranks.size)
        if wrapper == "fsdp2":
            shard(self.inner, ranks.size, self.device)
        self.notes: list[str] = [] if config.then is None else ranks.together(self._try_then)
        self.strategy = config.strategy  # of the step that comes next
        self.balance: Balance = ranks.together(self._attach)
        self.model = copy_to_ranks(self.inner) if wrapper == "ddp" else self.inner
        self.k, self.num_experts = ranks.together(self._sizes)
        decayed = [p for p in self.inner.parameters() if p.requires_grad and p.dim() >= 2]
        other = [p for p in self.inner.parameters() if p.requires_grad and p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.done, self.saved = 0, 0  # steps: trained, in the newest checkpoint
        self.folder = RunFolder(config, watcher)  # rank 0 alone writes into it
        self.autocast = ranks.first(self.folder.open, self._facts(command), self._machine())

    def _load_corpus(self) -> Corpus:
        return load_corpus(
            None if self.config.data == "corpus" else self.config.data,
            tokenizer=self.config.tokenizer,
            vocab_size=self.config.vocab_size,
            progress=self.watcher.say,
            sequence_length=self.config.sequence_length,
        )

    def _attach(self) -> Balance:
        return attach_strategy(self.inner, self.strategy, biases=self._saved_biases())

    def _try_then(self) -> list[str]:
        """Finds out before the first step whether the strategy that takes over can be attached; its notes."""
        config = self.config
        assert config.then is not None and config.switch_at is not None
        balance = attach_strategy(self.inner, config.then)
        balance.detach()
        return balance.notes(config.steps - config.switch_at)

    def _balance_of(self, step: int) -> Balance:
        """What balances ``step``, before its state is loaded."""
        strategy = self.config.strategy_of(step)
        if strategy != self.strategy:
            self.balance.detach()
            self.strategy = strategy
            self.balance = self.ranks.together(self._attach)
        return self.balance

    def _sizes(self) -> tuple[int, int]:
        """k and the number of experts, of every layer."""
        sizes = {(router.k, router.num_experts) for router in find_routers(self.inner)}
        if len(sizes) > 1:
            found = ", ".join(f"{k} of {num_experts}" for k, num_experts in sorted(sizes))
            raise UsageError(
                f"--model must choose as many of as many experts in every layer: it has layers with {found}. Train it "
                "in a loop of your own, with attach."
            )
        return sizes.pop()

    def _saved_biases(self) -> Path | None:
        """The biases that lie beside the weights of --model, where its family has no slot for them."""
        if self.config.model is None or not (self.config.model / BIASES_FILE).exists():
            return None
        if holds_biases(self.strategy):
            return self.config.model
        self.watcher.say(f"{self.strategy} holds no biases: those beside {self.config.model} are left out")
        return None

    def _facts(self, command: str) -> dict[str, Any]:
        config = self.config
        return {
            "strategy": config.label,
            "seed": config.seed,
            "arch": config.arch if config.model is None else self.inner.config.model_type,
            "steps": config.steps,
            "options": asked(config),
            "num_parameters": sum(p.numel() for p in self.inner.parameters()),
            "num_active_parameters": num_active_parameters(self.inner, self.k, self.num_experts),
            "score_function": find_routers(self.inner)[0][2].score_function,
            "num_experts": self.num_experts,
            "experts_per_token": self.k,
            "layers": list(self.balance.biases),
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
            "dtype": "bfloat16" if self.autocast else "float32",
            "command": command,
            "began": datetime.datetime.now(datetime.UTC).isoformat(),
            "notes": list(dict.fromkeys(self.balance.notes(config.switch_at or config.steps) + self.notes)),
        }

    def _machine(self) -> dict[str, Any]:
        names = ("torch", "transformers", "tokenizers", "numpy")
        wrapper, num_ranks = find_wrapper(self.model)
        return {
            "wrapper": wrapper,
            "num_ranks": num_ranks,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": {
                "equipoise": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in names},
            },
        }

    def run(self) -> dict[str, Any]:
        with self.ranks.alive(lambda: f"at step {self.done + 1}", self._what_then):
            return self._run()

    def _run(self) -> dict[str, Any]:
        config, ranks = self.config, self.ranks
        facts = checkpoint.load_newest(
            self.folder.checkpoints, self.inner, self.optimizer, self._balance_of, self.watcher.say, ranks
        )
        self.done = self.saved = 0 if facts is None else facts["step"]
        if self.model is not self.inner:
            self._settle()
        ranks.first(self.folder.begin, self.done)
        for step in range(self.done, config.steps):
            if config.strategy_of(step + 1) != self.strategy:
                self.strategy = config.strategy_of(step + 1)
                self.balance = ranks.together(switch, self.inner, self.balance, self.strategy)
            row, load = self._step(step), [load.tolist() for load in self.balance.load.values()]
            ranks.first(self.folder.step, row, load, patient=False)
            self.done, last = step + 1, step + 1 == config.steps
            if config.evaluate_every and self.done % config.evaluate_every == 0 and not last:
                ranks.first(self.folder.evaluation, self.done, self._evaluate("selection")[0])
            if self.done % config.checkpoint_every == 0 and not last:
                ranks.first(self.folder.sync)
                checkpoint.save(self.folder.checkpoints, self.done, self.inner, self.optimizer, self.balance, ranks)
                self.saved = self.done
        return self._finish()

    def _what_then(self) -> str:
        newest = f"The newest checkpoint is of step {self.saved}" if self.saved else "There is no checkpoint yet"
        return f"{newest}; start the same command again with --resume."

    def _settle(self) -> None:
        """A backward before the first step. DDP lays gradients out anew after the first one, and where more than two
        ranks are summed the layout decides the rounding: so a run that goes on rounds as one that never stopped."""
        ids = self.batches.window(0)[0].input_ids.to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.balance.paused(), autocast:  # no number that a step would have taken
            loss = language_model_loss(self.model, ids)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, step: int) -> dict[str, Any]:
        config, started = self.config, time.perf_counter()
        rate = learning_rate_at(step, steps=config.steps, peak=config.learning_rate, warmup=config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        window = self.batches.window(step)
        losses, task, balancing = [], torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        interleaved = config.order == "interleaved"
        for number, micro_batch in enumerate(window, start=1):
            with synchronising(self.model, not interleaved or number == len(window)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss = language_model_loss(self.model, micro_batch.input_ids.to(self.device))
                ticket = self.balance.loss()
                task, balancing = task + loss.detach(), balancing + ticket.detach()
                loss = (loss + ticket) / len(window)  # equally many tokens in each; ranks average their gradients
                if interleaved:
                    loss.backward()
                else:
                    losses.append(loss)
        if losses:
            torch.stack(losses).sum().backward()
        norm = full(nn.utils.clip_grad_norm_(self.inner.parameters(), config.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balance.step()
        figures = {
            "loss": float(task) / len(window),
            "balancing_loss": float(balancing) / len(window),
            "told": 0.0 if told() is None else 1.0,
            **{name: value for name, value in self.balance.metrics().items() if name != "tokens"},
        }
        figures = self.ranks.mean(figures)  # some are of this rank's micro-batches
        if figures.pop("told") == 1:
            raise KeyboardInterrupt  # on every rank, after the same step
        return {
            "step": step + 1,
            **({} if config.then is None else {"strategy": self.strategy}),
            "loss": figures.pop("loss"),
            "balancing_loss": figures.pop("balancing_loss"),
            "grad_norm": float(norm),
            "learning_rate": rate,
            "tokens": (step + 1) * self.folder.tokens_per_step,
            **figures,
            "seconds": time.perf_counter() - started,
        }

    def _evaluate(self, split: str, by_token: bool = False) -> tuple[dict[str, Any], Audited]:
        return evaluate(
            self.inner,
            self.balance,
            self.corpus,
            split=split,
            sequence_length=self.config.sequence_length,
            most_sequences=self.config.evaluation_sequences,
            sequences=self.config.sequences,
            k=self.k,
            device=self.device,
            autocast=self.autocast,
            ranks=self.ranks,
            by_token=by_token,
        )

    def _finish(self) -> dict[str, Any]:
        config, ranks = self.config, self.ranks
        self.watcher.say("evaluating on the selection text and on the test text")
        selection, _ = self._evaluate("selection")
        row, audited = self._evaluate("test", by_token=True)
        ranks.first(self.folder.evaluation, config.steps, selection)
        ranks.first(self.folder.evaluation, config.steps, row)
        ranks.first(self.folder.audit, audited, self.corpus, self.inner.config.model_type)
        if config.save_model:
            note = checkpoint.save_model(
                config.out / "model", self.inner, self.balance, self.corpus.tokenizer_file, ranks
            )
            if note:
                self.watcher.say(note)
        result = ranks.first(self.folder.finish, selection, row)
        self.watcher.end()
        return result
