"""Runs of the lab on several ranks, for ``test_lab.py``. A module of its own, because other processes import it."""

import os
import random
import shutil
import sys
import traceback
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from equipoise.errors import EquipoiseError
from equipoise_lab.experts.result import summarise
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.loop import _Training, train
from equipoise_lab.train.ranks import Ranks, is_shared, join_ranks

WORDS = {
    "fruit": "apple pear plum cherry grape melon fig lemon lime peach",
    "metal": "iron copper zinc silver gold lead tin nickel cobalt steel",
    "river": "rhine danube elbe seine loire tagus volga thames ebro po",
}
STRATEGY = "loss-free:rate=1e-2+lbl:scope=global_batch"
MAX_FILE_BYTES = 40_000  # simulates a full disk: a checkpoint is larger


def write_text(folder: Path, num_documents: int = 60) -> Path:
    folder.mkdir()
    for name, words in WORDS.items():
        draw = random.Random(name)
        documents = [" ".join(draw.choices(words.split(), k=60)) for _ in range(num_documents)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return folder


def tiny(root: Path, name: str, **options) -> Train:
    """A run of seconds. An evaluation has three batches per domain, which two ranks cannot share evenly."""
    config = Train(
        out=root / name,
        data=str(root / "text"),
        strategy=STRATEGY,
        vocab_size=300,
        steps=8,
        layers=2,
        width=32,
        experts=4,
        experts_per_token=2,
        expert_width=16,
        sequence_length=16,
        sequences=2,
        micro_batches=4,
        evaluation_sequences=6,
        checkpoint_every=3,
        dtype="float32",
        save_model=False,
    )
    return replace(config, **options)


class Watcher:
    """Records the progress of a run. Stops the run after the step ``stop_after``."""

    def __init__(self, stop_after: int | None = None):
        self.said, self.done, self.stop_after = [], None, stop_after

    def say(self, text):
        self.said.append(text)

    def begin(self, config, done):
        self.done = done

    def step(self, row, tokens_per_second):
        if row["step"] == self.stop_after:
            raise KeyboardInterrupt

    def end(self):
        pass


def attempt(config: Train, ranks: Ranks, stop_after: int | None = None) -> dict:
    """Trains a run on this rank. Returns its result or its error, its messages and the step it started from."""
    watcher = Watcher(stop_after)
    outcome = {"result": None, "error": None, "shared": None}
    try:
        outcome["result"] = train(config, watcher, "", ranks)
    except (EquipoiseError, KeyboardInterrupt) as error:
        outcome |= {"error": f"{type(error).__name__}: {error}", "shared": is_shared(error)}
    return {**outcome, "said": watcher.said, "done": watcher.done}


def attempt_on_a_full_disk(config: Train, ranks: Ranks) -> dict:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, before[1]))
    try:
        return attempt(config, ranks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _only_first(rank: int, function, *args) -> None:
    if rank == 0:
        function(*args)


def _begin(rank: int, root: Path) -> Ranks:
    os.environ["EQUIPOISE_CACHE"] = str(root / "cache")
    return join_ranks()


def two(rank: int, root: Path) -> dict[str, dict]:
    """All runs of two ranks, by name."""
    ranks = _begin(rank, root)

    def run(name, stop_after=None, **options):
        return attempt(tiny(root, name, **options), ranks, stop_after)

    attempts = {}
    for wrapper in ("ddp", "fsdp2"):
        attempts[wrapper] = run(wrapper, wrapper=wrapper, evaluate_every=3, save_model=True)
        name, loss = f"{wrapper} interleaved", "loss-free+lbl:scope=micro_batch"
        few = {"evaluation_sequences": 2}  # one batch per domain: one rank has none
        attempts[name] = run(name, wrapper=wrapper, order="interleaved", strategy=loss, steps=3, **few)
        name = f"{wrapper} cut"
        attempts[name] = run(name, 5, wrapper=wrapper, evaluate_every=3, save_model=True)
        _only_first(rank, shutil.copytree, root / name, root / f"{name}, on other ranks")
        attempts[f"{name} resumed"] = run(name, wrapper=wrapper, evaluate_every=3, save_model=True, resume=True)
    attempts["fsdp2 to ddp"] = run("fsdp2 cut, on other ranks", evaluate_every=3, save_model=True, resume=True)
    attempts["one to fsdp2"] = run("one cut", wrapper="fsdp2", resume=True)
    switched = {"strategy": "loss-free:rate=1e-2", "then": "loss-free:rate=1e-2+lbl", "switch_at": 4}
    for wrapper in ("ddp", "fsdp2"):
        attempts[f"{wrapper} switched"] = run(f"{wrapper} switched", wrapper=wrapper, **switched)
        for stop_after in (5, 8):  # resumes from a checkpoint before the switch, or after it
            name = f"{wrapper} switched, stopped after {stop_after}"
            run(name, stop_after, wrapper=wrapper, **switched)
            attempts[name] = run(name, wrapper=wrapper, **switched, resume=True)
    joined = {"strategy": "lbl:scope=micro_batch,coefficient=1", "balance_batch": 2, "steps": 3}
    attempts["ddp together"] = run("ddp together", wrapper="ddp", **joined)
    attempts["balance batch"] = run("balance batch", balance_batch=4)
    attempts["qwen"] = run("qwen", arch="qwen3_moe", wrapper="fsdp2", steps=2, save_model=True)

    attempts["options"] = run("options", learning_rate=1e-3 * (1 + rank))
    attempts["micro-batches"] = run("micro-batches", micro_batches=3)
    attempts["no wrapper"] = run("no wrapper", wrapper="none")
    attempts["not new"] = run("ddp") if rank == 0 else run(f"not new {rank}")
    os.chdir(root / str(rank))  # a relative path leads to different files on each rank
    attempts["other text"] = run("other text", data="text")
    attempts["model of one"] = run("model of one", model=Path("model"))

    attempts["full disk"] = attempt_on_a_full_disk(tiny(root, "full disk", checkpoint_every=6), ranks)
    attempts["room again"] = run("full disk", checkpoint_every=6, resume=True)
    name = "damaged"
    run(name, 8)
    if rank == 0:
        state = root / name / "checkpoints" / "step-00000006" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:100])
    attempts[name] = run(name, resume=True)

    options = vars(tiny(root, "compare", steps=2))
    common = {name: value for name, value in options.items() if name not in ("strategy", "seed")}
    watcher = Watcher()
    try:
        results, failure = compare(Compare(**common, strategies=("none", STRATEGY)), watcher, "", ranks)
        attempts["compare"] = {"results": results, "failure": failure}
    except Exception:
        attempts["compare"] = {"results": traceback.format_exc(), "failure": None}
    return attempts


def tracked(rank: int, root: Path) -> dict:
    """A run with a stand-in of trackio, through the tracker of Accelerate. Returns what this rank's stand-in got."""
    ranks, steps = _begin(rank, root), []

    def log(values: dict, step: int) -> None:
        if "train/loss" in values:
            steps.append(step)

    run = SimpleNamespace(id="run", log=log)
    stand_in = ModuleType("trackio")
    stand_in.__spec__ = ModuleSpec("trackio", None)
    vars(stand_in).update(init=lambda **options: run, finish=lambda: steps.append("finished"))
    sys.modules["trackio"] = stand_in
    threads = torch.get_num_threads()
    outcome = attempt(tiny(root, "tracked", tracker=("trackio",)), ranks)
    return {**outcome, "steps": steps, "threads": torch.get_num_threads() - threads}


def one_run(rank: int, root: Path, name: str, options: dict) -> dict:
    return attempt(tiny(root, name, **options), _begin(rank, root))


def evaluated(root: Path, ranks: Ranks) -> dict[str, tuple]:
    """The evaluation of untrained models and their audit, with three batches per domain and with one."""
    evaluations = {}
    for wrapper in ("none",) if ranks.size == 1 else ("ddp", "fsdp2"):
        for sequences in (6, 2):
            name = f"{wrapper} {sequences}"
            config = tiny(root, f"evaluated {name}", wrapper=wrapper, evaluation_sequences=sequences)
            training = _Training(config, Watcher(), "", ranks)
            row, audited = training._evaluate("test", by_token=True)
            evaluations[name] = row, summarise(audited, training.corpus.decoder())
    return evaluations


def evaluated_on_ranks(rank: int, root: Path) -> dict[str, tuple]:
    return evaluated(root, _begin(rank, root))


def four(rank: int, root: Path) -> dict[str, dict]:
    """A run that is stopped and one that is not, large enough that sums over four ranks are rounded."""
    ranks = _begin(rank, root)
    wide = {"width": 64, "layers": 2, "expert_width": 32, "steps": 6}
    attempts = {"whole": attempt(tiny(root, "four", **wide), ranks)}
    attempts["cut"] = attempt(tiny(root, "four cut", **wide), ranks, 5)
    attempts["resumed"] = attempt(tiny(root, "four cut", **wide, resume=True), ranks)
    return attempts
