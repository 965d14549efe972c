"""Trains one model under one strategy and writes its run folder.

corpus -> micro-batches -> forwards of a window -> one backward -> optimizer -> balance.step() -> records

Only rank 0 touches the run folder, inside ``ranks.run_on_first``: other nodes may not have the folder.
"""

import dataclasses
import datetime
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from equipoise import __version__
from equipoise.balance import Balance
from equipoise.counting.window_metrics import without_constants
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.find import find_routers
from equipoise.saved import BIASES_FILE
from equipoise_lab.experts.result import AuditData
from equipoise_lab.paths import check_writable, some_names
from equipoise_lab.records import is_new
from equipoise_lab.train import checkpoint
from equipoise_lab.train.balancers import attach_strategy, check_strategy
from equipoise_lab.train.config import Train
from equipoise_lab.train.data import Corpus
from equipoise_lab.train.engine import learning_rate_at, machine, reproducible
from equipoise_lab.train.evaluate import evaluate, language_model_loss
from equipoise_lab.train.models import build_model, num_active_parameters
from equipoise_lab.train.ranks import ONE_PROCESS, Ranks, join_ranks
from equipoise_lab.train.resume_advice import resume_advice
from equipoise_lab.train.run_folder import RunFolder, SilentWatcher, Watcher, complete_result, resume_options
from equipoise_lab.train.run_text import batches_of, load_text
from equipoise_lab.train.selection import check_selection, install_selection
from equipoise_lab.train.stop import deferred, end_grace, stop_requested
from equipoise_lab.train.switch import check_switch, has_biases, switch
from equipoise_lab.train.tracker_kinds import check_trackers, where_to_look
from equipoise_lab.train.wrappers import (
    check_wrapper,
    copy_to_ranks,
    find_wrapper,
    full_tensor,
    shard,
    synchronising,
    weights_digest,
)

__all__ = ["check", "check_same_options", "train"]


def check(config: Train, ranks: Ranks = ONE_PROCESS) -> None:
    """Checks everything that can be checked before a model is built."""
    ranks.run_on_all(_check_options, config, ranks.size)
    ranks.run_on_first(_check_out, config)
    ranks.run_on_first(check_trackers, config)


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
            f"{config.micro_batches} on {num_ranks} ranks. Use {next_multiple}, or another number of ranks."
        )
    if config.micro_batches // num_ranks % config.balance_batch:
        raise UsageError(
            "--balance-batch must divide the number of micro-batches per rank: got "
            f"{config.balance_batch} and {config.micro_batches // num_ranks} on each of {num_ranks} ranks."
        )


def _check_out(config: Train) -> None:
    out = config.out
    if out.exists() and not out.is_dir():
        raise EquipoiseError(f"--out must be a folder: {out} is a file. Choose another.")
    if not is_new(out) and not config.resume:
        raise EquipoiseError(
            f"--out must be new or empty: {out} holds {some_names(out)}. Nothing was changed. Choose another folder, "
            "or continue a stopped run with --resume."
        )
    if (out / "compare.json").exists() and not is_new(out):
        raise EquipoiseError(
            f"--resume needs the folder of a run: {out} holds a comparison. Use `equipoise compare --resume`, or name "
            "one of its runs."
        )
    check_writable(out, "--out")


def train(
    config: Train, watcher: Watcher, command: str = "", ranks: Ranks | None = None, *, says_text: bool = True
) -> dict[str, Any]:
    """Trains one run and returns its result (the content of ``result.json``), on every rank.

    The default of ``ranks`` is the ranks that torchrun started (:func:`equipoise_lab.train.ranks.join_ranks`). Without
    ``says_text`` nothing is said about the text and the trackers: a comparison says it before its runs.
    """
    ranks = join_ranks() if ranks is None else ranks
    watcher = watcher if ranks.rank == 0 else SilentWatcher()
    check_same_options(config, ranks)
    check(config, ranks)
    result = ranks.run_on_first(complete_result, config, watcher)
    if result is not None:
        return result
    for name in config.trackers if says_text else ():
        watcher.say(where_to_look(name, config.out))
    with reproducible():
        with ranks.report_lost_rank(lambda: "before the first step", lambda: "Start the same command again."):
            training = _Training(config, watcher, command, ranks, says_text=says_text)
        try:
            return training.run()
        except (MemoryError, torch.OutOfMemoryError) as error:
            if ranks.size > 1:
                raise  # the other ranks still wait for this one
            raise EquipoiseError(
                f"a run must fit into memory: {config.label}, seed {config.seed}, needs more. {str(error)[:300]} Use "
                "fewer --sequences or --experts, or a smaller --width; --resume goes on after the newest checkpoint."
            ) from error
        finally:
            training.folder.release()


def check_same_options(config: Any, ranks: Ranks) -> None:
    """Raises EquipoiseError if ranks were started with different options. ``out`` may differ: only rank 0 uses it."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del options["out"]
    ranks.check_equal(
        {"command": type(config).__name__.lower(), **options},
        lambda name, value, rank, other_value: (
            f"every rank must be started with the same options: {name} is {value!r} on rank 0, but {other_value!r} on "
            f"rank {rank}. Start every node with the same command; only --out may differ."
        ),
    )


def _different_weights(name: str, value: Any, rank: int, other_value: Any) -> str:
    return (
        f"every rank must start with the same {name}: rank {rank} and rank 0 differ. Copy --model to every node, and "
        "install the same versions there."
    )


def _stop_requested() -> float:
    return 0.0 if stop_requested() is None else 1.0


class _Training:
    def __init__(
        self, config: Train, watcher: Watcher, command: str, ranks: Ranks = ONE_PROCESS, *, says_text: bool = True
    ):
        self.config, self.watcher, self.ranks = config, watcher, ranks
        self.device, autocast = machine(config.dtype)
        self.autocast = all(ranks.gather(autocast))
        self.corpus: Corpus = load_text(config, watcher if says_text else SilentWatcher(), ranks)
        self.batches = batches_of(config, self.corpus, ranks)
        self.inner: nn.Module = ranks.run_on_all(build_model, config, self.corpus.vocab_size)
        if ranks.size > 1:
            ranks.check_equal({"weights": weights_digest(self.inner)}, _different_weights)
        ranks.run_on_all(install_selection, self.inner, config.selection)
        self.inner = self.inner.to(self.device).train()
        wrapper = check_wrapper(config.wrapper, ranks.size)
        if wrapper == "fsdp2":
            shard(self.inner, ranks.size, self.device)
        self.notes: list[str] = [] if config.then is None else ranks.run_on_all(self._try_then)
        self.strategy = config.strategy  # the strategy of the next step
        self.balance: Balance = ranks.run_on_all(self._attach)
        self.model = copy_to_ranks(self.inner) if wrapper == "ddp" else self.inner
        self.k, self.num_experts = ranks.run_on_all(self._sizes)
        decayed = [p for p in self.inner.parameters() if p.requires_grad and p.dim() >= 2]
        other = [p for p in self.inner.parameters() if p.requires_grad and p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.done, self.saved = 0, 0  # number of steps: trained, and in the newest checkpoint
        self.stops = False  # whether every rank was asked to stop by the end of the last step
        self.folder = RunFolder(config, watcher)  # only rank 0 writes into it
        self.autocast = ranks.run_on_first(self.folder.open, self._facts(command), self._machine())

    def _attach(self) -> Balance:
        return attach_strategy(self.inner, self.strategy, biases=self._saved_biases())

    def _try_then(self) -> list[str]:
        """Tests before the first step that the second strategy can be attached. Returns its notes."""
        config = self.config
        assert config.then is not None and config.switch_at is not None
        balance = attach_strategy(self.inner, config.then)
        balance.detach()
        return balance.notes(config.steps - config.switch_at)

    def _balance_of(self, step: int) -> Balance:
        """The Balance of ``step``, without its saved state. Attaches it if the strategy changes."""
        strategy = self.config.strategy_of(step)
        if strategy != self.strategy:
            self.balance.detach()
            self.strategy = strategy
            self.balance = self.ranks.run_on_all(self._attach)
        return self.balance

    def _sizes(self) -> tuple[int, int]:
        """k and the number of experts, which must be the same in every layer."""
        sizes = {(router.k, router.num_experts) for router in find_routers(self.inner)}
        if len(sizes) > 1:
            different = " and ".join(f"{k} of {num_experts}" for k, num_experts in sorted(sizes))
            raise UsageError(
                "--model must have the same k and number of experts in every layer: it has layers that choose "
                f"{different} experts. Train it in a loop of your own, with attach."
            )
        return sizes.pop()

    def _saved_biases(self) -> Path | None:
        """The folder of --model if it has a bias file beside its weights, which families without a slot need."""
        if self.config.model is None or not (self.config.model / BIASES_FILE).exists():
            return None
        if has_biases(self.strategy):
            return self.config.model
        self.watcher.say(f"the strategy {self.strategy} has no biases: the bias file in {self.config.model} is ignored")
        return None

    def _facts(self, command: str) -> dict[str, Any]:
        config = self.config
        return {
            "strategy": config.label,
            "seed": config.seed,
            "arch": config.arch if config.model is None else self.inner.config.model_type,
            "steps": config.steps,
            "options": resume_options(config),
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
        with self.ranks.report_lost_rank(lambda: f"at step {self.done + 1}", self._resume_hint):
            try:
                with deferred(self._announce_stop):
                    return self._run()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(resume_advice(self.config) if self.ranks.rank == 0 else "") from None

    def _run(self) -> dict[str, Any]:
        config, ranks = self.config, self.ranks
        facts = checkpoint.load_newest(
            self.folder.checkpoints, self.inner, self.optimizer, self._balance_of, self.watcher.say, ranks
        )
        self.done = self.saved = 0 if facts is None else facts["step"]
        if self.model is not self.inner:
            self._warm_up_ddp()
        ranks.run_on_first(self.folder.begin, self.done)
        first = self.done
        for step in range(first, config.steps):
            if config.strategy_of(step + 1) != self.strategy:
                self.strategy = config.strategy_of(step + 1)
                self.balance = ranks.run_on_all(switch, self.inner, self.balance, self.strategy)
            row, load = self._step(step), [load.tolist() for load in self.balance.load.values()]
            ranks.run_on_first(self.folder.step, row, load, patient=step == first)  # a tracker may start slowly
            self.done, last = step + 1, step + 1 == config.steps
            if config.evaluate_every and self.done % config.evaluate_every == 0 and not last:
                ranks.run_on_first(self.folder.evaluation, self.done, self._evaluate("selection")[0])
            if self.stops or (ranks.size == 1 and _stop_requested()):
                self._stop()
            if self.done % config.checkpoint_every == 0 and not last:
                self._save()
        return self._finish()

    def _save(self) -> None:
        self.ranks.run_on_first(self.folder.sync)
        checkpoint.save(self.folder.checkpoints, self.done, self.inner, self.optimizer, self.balance, self.ranks)
        self.saved = self.done

    def _announce_stop(self) -> None:
        part = "step" if self.done < self.config.steps else "evaluation"
        self.watcher.say(f"stopping after this {part}, with a checkpoint; Ctrl-C again leaves at once")

    def _stop(self) -> NoReturn:
        """Writes a checkpoint and stops, on every rank."""
        end_grace()
        if self.saved != self.done:
            self._save()
        raise KeyboardInterrupt

    def _resume_hint(self) -> str:
        newest = f"The newest checkpoint is of step {self.saved}" if self.saved else "There is no checkpoint yet"
        return f"{newest}; start the same command again with --resume."

    def _warm_up_ddp(self) -> None:
        """Runs one backward before the first step.

        DDP changes its layout of the gradients after the first backward. With more than two ranks, the layout decides
        how sums are rounded. After this warm-up a resumed run rounds like a run that never stopped.
        """
        ids = self.batches.window(0)[0].input_ids.to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.balance.paused(), autocast:  # uses no random number of a later step
            loss = language_model_loss(self.model, ids)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, step: int) -> dict[str, Any]:
        config, started = self.config, time.perf_counter()
        rate = learning_rate_at(
            step, steps=config.steps, peak=config.learning_rate, warmup=config.warmup, decay_to=config.decay_to
        )
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        window = self.batches.window(step)
        losses, task, balancing = [], torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        interleaved = config.order == "interleaved"
        for number, batch in enumerate(window, start=1):
            with synchronising(self.model, not interleaved or number == len(window)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss = language_model_loss(self.model, batch.input_ids.to(self.device))
                balancing_loss = self.balance.loss()
                task, balancing = task + loss.detach(), balancing + balancing_loss.detach()
                # All batches have equally many tokens, and the ranks average their gradients.
                loss = (loss + balancing_loss) / len(window)
                if interleaved:
                    loss.backward()
                else:
                    losses.append(loss)
        if losses:
            torch.stack(losses).sum().backward()
        norm = full_tensor(nn.utils.clip_grad_norm_(self.inner.parameters(), config.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balance.step()
        figures = {
            "loss": float(task) / len(window),
            "balancing_loss": float(balancing) / len(window),
            "stop_requested": _stop_requested(),
            **without_constants(self.balance.metrics()),
        }
        del figures["tokens"]  # of this step
        figures = self.ranks.mean(figures)  # some only cover the micro-batches of this rank
        self.stops = figures.pop("stop_requested") == 1
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

    def _evaluate(self, split: str, by_token: bool = False) -> tuple[dict[str, Any], AuditData]:
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
        if ranks.mean({"stop_requested": _stop_requested()})["stop_requested"] == 1:
            self._stop()
        row, audited = self._evaluate("test", by_token=True)
        ranks.run_on_first(self.folder.evaluation, config.steps, selection)
        ranks.run_on_first(self.folder.evaluation, config.steps, row)
        ranks.run_on_first(self.folder.audit, audited, self.corpus, self.inner.config.model_type)
        if config.save_model:
            note = checkpoint.save_model(
                config.out / "model", self.inner, self.balance, self.corpus.tokenizer_file, ranks
            )
            if note:
                self.watcher.say(note)
        result = ranks.run_on_first(self.folder.finish, selection, row)
        self.watcher.end()
        return result
