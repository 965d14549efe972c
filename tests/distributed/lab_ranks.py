"""Runs of the lab on several ranks, for ``test_lab.py``; a module of its own, since other processes import it."""

import os
import random
import shutil
import traceback
from dataclasses import replace
from pathlib import Path

from equipoise.errors import EquipoiseError
from equipoise_lab.experts.result import summarise
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.loop import _Training, train
from equipoise_lab.train.ranks import Ranks, is_shared, meet

WORDS = {
    "fruit": "apple pear plum cherry grape melon fig lemon lime peach",
    "metal": "iron copper zinc silver gold lead tin nickel cobalt steel",
    "river": "rhine danube elbe seine loire tagus volga thames ebro po",
}
STRATEGY = "loss-free:rate=1e-2+lbl:scope=global_batch"
MOST_BYTES = 40_000  # of a file, on a full disk: less than a checkpoint has


def write_text(folder: Path, num_documents: int = 60) -> Path:
    folder.mkdir()
    for name, words in WORDS.items():
        draw = random.Random(name)
        documents = [" ".join(draw.choices(words.split(), k=60)) for _ in range(num_documents)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return folder


def tiny(root: Path, name: str, **options) -> Train:
    """A run of seconds; three batches of each domain are evaluated, which two ranks cannot share evenly."""
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
    """Remembers, and may stop a run after a step."""

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
    """What came of a run on this rank: its result or its error, what was said, and from which step on."""
    watcher = Watcher(stop_after)
    found = {"result": None, "error": None, "shared": None}
    try:
        found["result"] = train(config, watcher, "", ranks)
    except (EquipoiseError, KeyboardInterrupt) as error:
        found |= {"error": f"{type(error).__name__}: {error}", "shared": is_shared(error)}
    return {**found, "said": watcher.said, "done": watcher.done}


def attempt_on_a_full_disk(config: Train, ranks: Ranks) -> dict:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, before[1]))
    try:
        return attempt(config, ranks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _only_first(rank: int, function, *args) -> None:
    if rank == 0:
        function(*args)


def _begin(rank: int, root: Path) -> Ranks:
    os.environ["EQUIPOISE_CACHE"] = str(root / "cache")
    return meet()


def two(rank: int, root: Path) -> dict[str, dict]:
    """Every run that two ranks make."""
    ranks = _begin(rank, root)

    def run(name, stop_after=None, **options):
        return attempt(tiny(root, name, **options), ranks, stop_after)

    found = {}
    for wrapper in ("ddp", "fsdp2"):
        found[wrapper] = run(wrapper, wrapper=wrapper, evaluate_every=3, save_model=True)
        name, loss = f"{wrapper} interleaved", "loss-free+lbl:scope=micro_batch"
        few = {"evaluation_sequences": 2}  # one batch: a rank has none
        found[name] = run(name, wrapper=wrapper, order="interleaved", strategy=loss, steps=3, **few)
        name = f"{wrapper} cut"
        found[name] = run(name, 5, wrapper=wrapper, evaluate_every=3, save_model=True)
        _only_first(rank, shutil.copytree, root / name, root / f"{name}, on other ranks")
        found[f"{name} resumed"] = run(name, wrapper=wrapper, evaluate_every=3, save_model=True, resume=True)
    found["fsdp2 to ddp"] = run("fsdp2 cut, on other ranks", evaluate_every=3, save_model=True, resume=True)
    found["one to fsdp2"] = run("one cut", wrapper="fsdp2", resume=True)
    switched = {"strategy": "loss-free:rate=1e-2", "then": "loss-free:rate=1e-2+lbl", "switch_at": 4}
    for wrapper in ("ddp", "fsdp2"):
        found[f"{wrapper} switched"] = run(f"{wrapper} switched", wrapper=wrapper, **switched)
        for stop_after in (5, 8):  # the checkpoint is before the switch, or after it
            name = f"{wrapper} switched, stopped after {stop_after}"
            run(name, stop_after, wrapper=wrapper, **switched)
            found[name] = run(name, wrapper=wrapper, **switched, resume=True)
    joined = {"strategy": "lbl:scope=micro_batch,coefficient=1", "balance_batch": 2, "steps": 3}
    found["ddp together"] = run("ddp together", wrapper="ddp", **joined)
    found["balance batch"] = run("balance batch", balance_batch=4)
    found["qwen"] = run("qwen", arch="qwen3_moe", wrapper="fsdp2", steps=2, save_model=True)

    found["options"] = run("options", learning_rate=1e-3 * (1 + rank))
    found["micro-batches"] = run("micro-batches", micro_batches=3)
    found["no wrapper"] = run("no wrapper", wrapper="none")
    found["not new"] = run("ddp") if rank == 0 else run(f"not new {rank}")
    os.chdir(root / str(rank))  # what lies behind a relative path differs by rank
    found["other text"] = run("other text", data="text")
    found["model of one"] = run("model of one", model=Path("model"))

    found["full disk"] = attempt_on_a_full_disk(tiny(root, "full disk", checkpoint_every=6), ranks)
    found["room again"] = run("full disk", checkpoint_every=6, resume=True)
    name = "damaged"
    run(name, 8)
    for file in (root / name / "checkpoints" / "step-00000006").glob("*.distcp") if rank == 0 else ():
        file.write_bytes(file.read_bytes()[:100])
    found[name] = run(name, resume=True)

    options = vars(tiny(root, "compare", steps=2))
    common = {name: value for name, value in options.items() if name not in ("strategy", "seed")}
    watcher = Watcher()
    try:
        results, failure = compare(Compare(**common, strategies=("none", STRATEGY)), watcher, "", ranks)
        found["compare"] = {"results": results, "failure": failure}
    except Exception:
        found["compare"] = {"results": traceback.format_exc(), "failure": None}
    return found


def one_run(rank: int, root: Path, name: str, options: dict) -> dict:
    return attempt(tiny(root, name, **options), _begin(rank, root))


def evaluated(root: Path, ranks: Ranks) -> dict[str, tuple]:
    """The evaluation of untrained models, and what it says of their experts: of three batches a domain, and of one."""
    found = {}
    for wrapper in ("none",) if ranks.size == 1 else ("ddp", "fsdp2"):
        for sequences in (6, 2):
            name = f"{wrapper} {sequences}"
            config = tiny(root, f"evaluated {name}", wrapper=wrapper, evaluation_sequences=sequences)
            training = _Training(config, Watcher(), "", ranks)
            row, audited = training._evaluate("test", by_token=True)
            found[name] = row, summarise(audited, training.corpus.decoder())
    return found


def evaluated_on_ranks(rank: int, root: Path) -> dict[str, tuple]:
    return evaluated(root, _begin(rank, root))


def four(rank: int, root: Path) -> dict[str, dict]:
    """A run that is stopped, and one that is not: large enough for sums over four ranks to be rounded."""
    ranks = _begin(rank, root)
    wide = {"width": 64, "layers": 2, "expert_width": 32, "steps": 6}
    found = {"whole": attempt(tiny(root, "four", **wide), ranks)}
    found["cut"] = attempt(tiny(root, "four cut", **wide), ranks, 5)
    found["resumed"] = attempt(tiny(root, "four cut", **wide, resume=True), ranks)
    return found
