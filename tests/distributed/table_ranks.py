"""The table of ways to deal one window to ranks, and what a rank does in each; importable by spawned ranks.

{DDP, FSDP2} x {plain, checkpointed} x mechanism and scope x how the tokens lie on the ranks. What each must come to is
what one process comes to with the same eight micro-batches.
"""

import itertools
from typing import Any, NamedTuple

import torch
from models import VOCAB, tiny_lm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import equipoise
from equipoise.nn import MoE

MICRO_BATCHES = 8
BIASES = {
    "blocks.0.gate": torch.tensor([0.3, -0.2, 0.0, 0.1, -0.3, 0.1]),
    "blocks.1.gate": torch.tensor([-0.1, 0.2, 0.05, -0.05, 0.0, -0.1]),
}
SCOPES = ("sequence", "micro_batch", "global_batch")
MECHANISMS = ("loss-free", "quantile", "lbl", "composed")
DATA = ("even", "uneven", "padding")


class Cell(NamedTuple):
    wrapper: str
    checkpointed: bool
    mechanism: str
    scope: str
    data: str


def strategy(mechanism: str, scope: str) -> str | None:
    """None where a mechanism does not have the scope."""
    loss_free = {
        "global_batch": "loss-free:rate=1e-2,rule=sign",
        "micro_batch": "loss-free:rate=1e-2,rule=sign,scope=micro_batch",
    }
    return {
        "loss-free": loss_free.get(scope),
        "quantile": "quantile" if scope == "global_batch" else None,
        "lbl": f"lbl:scope={scope},coefficient=0.3",
        "composed": f"{loss_free.get(scope, loss_free['global_batch'])}+lbl:scope={scope},coefficient=0.3+z",
    }[mechanism]


CELLS = [
    cell
    for cell in itertools.starmap(Cell, itertools.product(("ddp", "fsdp"), (False, True), MECHANISMS, SCOPES, DATA))
    if strategy(cell.mechanism, cell.scope) is not None
]


class Micro(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor


def micro_batches(data: str, size: int, seed: int = 0) -> list[Micro]:
    """The eight of a window; rank r of ``size`` gets every ``size``-th from r. With ``uneven`` they differ in rows and
    padding, with ``padding`` all of the last rank's are padding and nothing else."""
    found = []
    for number in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(100 * seed + number)
        rows = 2 if data == "even" else 1 + number % 3
        ids = torch.randint(0, VOCAB, (rows, 7), generator=generator)
        mask = torch.ones_like(ids)
        if data != "even":
            mask[0, : (3 * number) % 7] = 0
        if data == "padding" and number % size == size - 1:
            mask[:] = 0
        found.append(Micro(ids, mask))
    return found


def wrapped(inner: nn.Module, wrapper: str) -> nn.Module:
    """What attach is given; DDP comes after it."""
    if wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in inner.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(inner, mesh=mesh, reshard_after_forward=False)
    return inner


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def window(model: nn.Module, balance: equipoise.Balance, mine: list[Micro]) -> None:
    losses = [model(*micro) + balance.loss() for micro in mine]
    (torch.stack(losses).sum() / len(mine)).backward()


def attached(cell: Cell) -> tuple[nn.Module, nn.Module, equipoise.Balance]:
    inner = tiny_lm("non_reentrant" if cell.checkpointed else None)
    steers = cell.mechanism != "lbl"
    model = wrapped(inner, cell.wrapper)
    balance = equipoise.attach(
        model, strategy(cell.mechanism, cell.scope), *([] if steers else ["frozen"]), biases=BIASES
    )
    return inner, nn.parallel.DistributedDataParallel(model) if cell.wrapper == "ddp" else model, balance


class Outcome(NamedTuple):
    counts: list[list[int]]
    biases: list[Tensor]
    gradients: dict[str, Tensor]
    traffic: tuple[float, float]


def run(cell: Cell, prepared: tuple[Any, ...], size: int, rank: int | None) -> Outcome:
    """One window on ``rank`` of ``size``; None: all of it."""
    inner, model, balance = prepared
    inner.zero_grad()
    balance.load_state_dict({"num_windows": 0, "biases": BIASES})
    everything = micro_batches(cell.data, size)
    window(model, balance, everything if rank is None else everything[rank::size])
    balance.step()
    metrics = balance.metrics()
    return Outcome(
        [load.tolist() for load in balance.load.values()],
        list(balance.biases.values()),
        {name: full(p.grad).clone() for name, p in inner.named_parameters() if p.grad is not None},
        (metrics["collectives"], metrics["collective_bytes"]),
    )


# ---- twenty steps in float64 ----

TWENTY = ("loss-free:rate=1e-2+lbl:scope=global_batch,coefficient=0.1", "quantile+lbl:scope=sequence,coefficient=0.1")


class Deep(nn.Module):
    """Embedding, two mixture-of-experts layers in float64, a head; the loss is over the unmasked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(
            MoE(8, hidden=6, num_experts=6, k=2, score_function=score_function)
            for score_function in ("sigmoid", "softmax")
        )
        self.head = nn.Linear(8, VOCAB)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x).flatten(0, 1)
        nats = nn.functional.cross_entropy(logits, ids.roll(-1, 1).flatten(), reduction="none")
        kept = attention_mask.flatten()
        return (nats * kept).sum() / kept.sum().clamp_min(1)


def twenty_steps(named: str, wrapper: str, size: int, rank: int | None) -> dict[str, Any]:
    torch.manual_seed(0)
    inner = Deep().double().train()
    for block in inner.blocks:
        nn.init.normal_(block.router.weight, std=0.5)
    model = wrapped(inner, wrapper)
    balance = equipoise.attach(model, named)
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    counts = []
    for step in range(20):
        everything = micro_batches("uneven", size, seed=step)
        window(model, balance, everything if rank is None else everything[rank::size])
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        counts.append([load.tolist() for load in balance.load.values()])
    weights = torch.cat([full(p.detach()).flatten() for p in inner.parameters()])
    return {"counts": counts, "biases": list(balance.biases.values()), "weights": weights}


def everything(rank: int, size: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    prepared, key = None, None
    for cell in CELLS:
        if key != cell[:-1]:
            key, prepared = cell[:-1], attached(cell)
        results[cell] = run(cell, prepared, size, rank)
    for named, wrapper in itertools.product(TWENTY, ("ddp", "fsdp")):
        results[named, wrapper] = twenty_steps(named, wrapper, size, rank)
    return results
