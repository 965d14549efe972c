"""Training that stops, is saved and goes on, on any number of ranks; importable by spawned ranks.

A window has the same four micro-batches whatever the number of ranks that they are dealt to.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import equipoise
from equipoise.nn import MoE

VOCAB, DIM, MICRO_BATCHES, ROWS, LENGTH = 24, 8, 4, 2, 9
SAVED, WINDOWS = 3, 6  # saved after so many windows; trained for so many in all
STRATEGIES = {
    "momentum": "loss-free:rule=momentum,rate=0.05,schedule=linear,zero_from=8+lbl:coefficient=0.2,pooling=previous",
    "quantile": "quantile:ema=0.5+lbl:coefficient=0.2",
    "factor": "loss-free:rule=multiplicative,rate=0.05",  # a slot that no model saves
}
ACCELERATED = STRATEGIES["momentum"]  # of these the one for which the order of forwards and backwards is the same
OVERFLOWS = (1, 4)  # windows whose gradient is not finite, in the training with Accelerate


class Block(nn.Module):
    def __init__(self, num_experts: int, score_function: str):
        super().__init__()
        self.norm, self.moe = nn.RMSNorm(DIM), MoE(DIM, 4, num_experts, 2, score_function=score_function)
        nn.init.normal_(self.moe.router.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class LM(nn.Module):
    """Two blocks whose balancers are in groups of their own; returns the loss."""

    def __init__(self, names: tuple[str, str] = ("first", "second")):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        blocks = (Block(6, "sigmoid"), Block(8, "softmax"))
        self.blocks = nn.ModuleDict(dict(zip(names, blocks, strict=True)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks.values():
            x = block(x)
        return nn.functional.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def lm(*names: str) -> LM:
    torch.manual_seed(0)
    return LM(*([names] if names else [])).double().train()


def micro_batch(window: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(MICRO_BATCHES * window + number)
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)


class Progress(NamedTuple):
    """What a training did: by window its load and the biases after it; then the whole parameters."""

    windows: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]
    parameters: dict[str, Tensor]


class Training:
    """A model, its optimizer and its balance on ``size`` ranks."""

    def __init__(self, strategy: str, wrapper: str = "none", rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.inner = lm()
        self.model: nn.Module = self.inner
        if wrapper == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.inner)
        if wrapper == "fsdp2":
            mesh = dist.init_device_mesh("cpu", (size,))
            for block in self.inner.blocks.values():
                dist.fsdp.fully_shard(block, mesh=mesh, reshard_after_forward=False)
            dist.fsdp.fully_shard(self.inner, mesh=mesh, reshard_after_forward=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.balance = equipoise.attach(self.model, strategy)
        self.after_micro_batch: Callable[[], Any] = lambda: None

    def window(self, number: int, applied: bool = True) -> None:
        losses = []
        for micro in range(self.rank, MICRO_BATCHES, self.size):
            losses.append(self.model(micro_batch(number, micro)) + self.balance.loss())
            self.after_micro_batch()
        torch.stack(losses).mean().backward()
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.balance.step(applied)

    def train(self, windows: Iterable[int], overflows: tuple[int, ...] = ()) -> Progress:
        found = {}
        for number in windows:
            self.window(number, applied=number not in overflows)
            found[number] = copy(self.balance)
        return Progress(found, whole(self.inner))

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "balance": self.balance}
        dcp.save(state, checkpoint_id=folder, no_dist=self.size == 1)

    def load(self, folder: Path, stateful: bool = True) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        balance = self.balance if stateful else self.balance.state_dict()
        state = {"model": model, "optimizer": optimizer, "balance": balance}
        dcp.load(state, checkpoint_id=folder, no_dist=self.size == 1)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        if not stateful:
            self.balance.load_state_dict(state["balance"])


def copy(balance: equipoise.Balance) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: load.clone() for name, load in balance.load.items()}, balance.biases


def whole(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in parameters.items()}


def begin(rank: int, folder: Path, wrapper: str, size: int) -> dict[str, Any]:
    """Trains until ``SAVED`` and saves: by strategy, the state on this rank."""
    found = {}
    for name, strategy in STRATEGIES.items():
        training = Training(strategy, wrapper, rank, size)
        training.train(range(SAVED))
        training.save(folder / name)
        found[name] = training.balance.state_dict()
    return found


def go_on(rank: int, folder: Path, wrapper: str, size: int) -> dict[str, Any]:
    """Takes up what ``begin`` saved: by strategy, the state on this rank after loading, and the windows after."""
    found = {}
    for name, strategy in STRATEGIES.items():
        training = Training(strategy, wrapper, rank, size)
        training.load(folder / name, stateful=name != "quantile")
        state = training.balance.state_dict()
        found[name] = (state, training.train(range(SAVED, WINDOWS)), training.balance.state_dict())
    return found


def states_within(rank: int) -> tuple[Progress, Progress, list[dict[str, Any]], list[dict[str, Any]]]:
    """Trains with and without states that rank 0 takes in open windows. Returns these, and those between windows."""
    within: list[dict[str, Any]] = []
    disturbed, undisturbed = (Training(STRATEGIES["quantile"], "ddp", rank, 2) for _ in range(2))
    if rank == 0:
        disturbed.after_micro_batch = lambda: within.append(disturbed.balance.state_dict())
    before = []
    windows: dict[int, Any] = {}
    for number in range(SAVED):
        before.append(disturbed.balance.state_dict())
        windows |= disturbed.train(range(number, number + 1)).windows
    return Progress(windows, whole(disturbed.inner)), undisturbed.train(range(SAVED)), within, before


# ---- states that must be refused ----


class Refused(NamedTuple):
    """What a load said, and the state before and after it."""

    kind: str
    text: str
    before: Any
    after: Any


def _refused(training: Training, load: Callable[[], None]) -> Refused:
    def now() -> Any:
        slots = {name: buffer.clone() for name, buffer in training.inner.named_buffers()}
        return {"balance": training.balance.state_dict(), "slots": slots, "parameters": whole(training.inner)}

    before, kind, text = now(), "", "went on"
    try:
        load()
    except (Exception, CheckpointException) as error:  # the second is no Exception
        kind, text = type(error).__name__, str(error)
    return Refused(kind, text, before, now())


def refusals(rank: int, folder: Path) -> dict[str, Refused]:
    """In ``folder`` is what ``other_names`` and ``begin`` saved in one process."""
    training = Training(STRATEGIES["momentum"], "ddp", rank, 2)
    training.train(range(1))
    older = training.balance.state_dict()
    training.train(range(1, 2))
    newer = training.balance.state_dict()
    other = equipoise.attach(lm("third", "fourth"), STRATEGIES["momentum"]).state_dict()
    renamed = newer | {"load": other["load"]}
    moved = newer | {"biases": {name: bias + rank for name, bias in newer["biases"].items()}}
    states = {
        "other names": (other, other),
        "other names on one rank": (newer, other),
        "other names of the counts on one rank": (newer, renamed),
        "older on one rank": (newer, older),
        "other biases on one rank": (moved, moved),
        "nothing on one rank": (newer, None),
    }
    load = training.balance.load_state_dict
    found = {name: _refused(training, partial(load, given[rank])) for name, given in states.items()}
    for name, place in (("a factor", folder / "one" / "factor"), ("checkpoint of other names", folder / "other names")):
        planner = DefaultLoadPlanner(allow_partial_load=name == "a factor")  # that checkpoint has no momenta
        read = partial(dcp.load, {"balance": training.balance}, checkpoint_id=place, planner=planner)
        found[name] = _refused(training, read)
    return found


def other_names(folder: Path) -> None:
    balance = equipoise.attach(lm("third", "fourth"), STRATEGIES["momentum"])
    dcp.save({"balance": balance}, checkpoint_id=folder, no_dist=True)


# ---- pipeline stages ----


def stages(rank: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two stages in one checkpoint, the first without routers: the state of this rank's before and after."""
    alone = [dist.new_group([other]) for other in range(2)][rank]

    def stage() -> tuple[nn.Module, equipoise.Balance]:
        model = lm() if rank else nn.Linear(DIM, DIM)
        return model, equipoise.attach(model, STRATEGIES["factor"], group=alone, allow_empty=True)

    model, balance = stage()
    if rank:
        model(micro_batch(0, 0))
    balance.step()
    dcp.save({"balance": balance}, checkpoint_id=folder)
    _, resumed = stage()
    dcp.load({"balance": resumed}, checkpoint_id=folder)
    return balance.state_dict(), resumed.state_dict()


# ---- Accelerate ----


def accelerator(rank: int, size: int) -> Any:
    """One that knows of the process group that is there, with a GradScaler, as it has for float16 on a GPU."""
    os.environ |= {"OMP_NUM_THREADS": "1"}
    if size > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in world.items()}
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    found = Accelerator(
        cpu=True,
        gradient_accumulation_steps=MICRO_BATCHES // size,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
    )
    assert found.num_processes == size
    found.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return found


def accelerated(rank: int, size: int, windows: range, load: Path | None, save: Path | None) -> tuple[Any, Progress]:
    """A loop as its users write it: the state on this rank at its beginning, and the windows."""
    this = accelerator(rank, size)
    rows = torch.cat([micro_batch(window, number) for window in windows for number in range(MICRO_BATCHES)])
    loader = torch.utils.data.DataLoader(rows, batch_size=ROWS)  # type: ignore[arg-type]
    inner = lm()
    model, optimizer, loader = this.prepare(inner, torch.optim.AdamW(inner.parameters(), lr=1e-2), loader)
    assert isinstance(model, nn.parallel.DistributedDataParallel) == (size > 1)
    balance = equipoise.attach(model, ACCELERATED)
    this.register_for_checkpointing(balance)
    if load is not None:
        this.load_state(str(load))
    state, found, window = balance.state_dict(), {}, windows.start
    for ids in loader:
        with this.accumulate(model):
            loss = model(ids) + balance.loss()
            this.backward(loss * torch.inf if window in OVERFLOWS and rank == 0 else loss)
            optimizer.step()
            optimizer.zero_grad()
            if this.sync_gradients:
                balance.step(applied=not optimizer.step_was_skipped)
                found[window] = copy(balance)
                window += 1
    if save is not None:
        this.save_state(str(save))
    this.free_memory()
    return state, Progress(found, whole(inner))


# ---- all of it, one spawn for a number of ranks ----


def on_four(rank: int, folder: Path) -> dict[str, Any]:
    return begin(rank, folder / "four", "fsdp2", 4)


def on_two(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        (source, wrapper): go_on(rank, folder / source, wrapper, 2)
        for source in ("four", "one")
        for wrapper in ("ddp", "fsdp2")
    }
    found["refused"] = refusals(rank, folder)
    found["stages"] = stages(rank, folder / "stages")
    found["within"] = states_within(rank)
    first, last = range(SAVED), range(SAVED, WINDOWS)
    found["accelerate begins"] = accelerated(rank, 2, first, None, folder / "accelerate")
    found["accelerate goes on"] = accelerated(rank, 2, last, folder / "accelerate", None)
    return found


def on_one(rank: int, folder: Path) -> dict[str, Any]:
    return {"accelerate goes on": accelerated(0, 1, range(SAVED, WINDOWS), folder / "accelerate", None)}
