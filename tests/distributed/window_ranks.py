"""What ranks do in ``test_window.py``; in a module of its own, so that other processes can import it."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from models import family, tiny_lm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module, distribute_tensor

import equipoise
from equipoise.counting import pool
from equipoise.errors import EquipoiseError
from equipoise.nn import Router

UNEQUAL = (
    "lbl:pooling=previous+loss-free:rate=1e-2",
    "loss-free:rate=1e-2,rule=sign",
    "quantile",
    "lbl:scope=sequence",
)
LAYERS = (1, 8, 64)
EXPERTS = 4
SETTINGS = ("loss-free", "quantile", "lbl:pooling=previous", "lbl", "lbl+quantile")


def said(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except EquipoiseError as error:
        return str(error)


def _ids(seed: int) -> Tensor:
    return torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(seed))


# ---- ranks that differ ----


def _window(rank, counts, strategy="lbl+loss-free"):
    model = family("glm4_moe", layers=1)
    balance = equipoise.attach(model, strategy)
    for seed in range(counts[rank]):
        (model(input_ids=_ids(seed)).logits.mean() + balance.loss()).backward()
    balance.step()
    return "went on"


WITH_STATISTICS = ("quantile", "quantile:bins=0", "loss-free:rule=sign,scope=micro_batch")
MEASURED_ALONE = ("loss-free", "lbl", "lbl+quantile", *WITH_STATISTICS)
PARTIAL = ("loss-free:rate=0.1", "quantile", "quantile:bins=0", "loss-free:rule=sign,scope=micro_batch,rate=0.1", "lbl")


def one_layer_on_one_rank(ranks, strategy):
    """The second layer is called by the forwards of rank 0 only; in the second window by none."""
    torch.manual_seed(0)
    model = nn.ModuleList([Router(6, EXPERTS, 2), Router(6, EXPERTS, 2)])
    balance = equipoise.attach(model, strategy)
    found = []
    for window in range(2):
        for rank in ranks:
            hidden = 5 + torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * window + rank))
            total = sum(router(hidden)[1].sum() for router in model[: 2 if rank + 2 * window == 0 else 1])
            (total + balance.loss()).backward()
        balance.step()
        found.append((balance.load, balance.biases))
    return found


def _unequal_start(rank):
    model = family("glm4_moe", layers=1)
    (slot,) = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    slot.fill_(rank)
    equipoise.attach(model, "loss-free")
    return "went on"


def _of_others(rank):
    balance = said(lambda: equipoise.attach(family("glm4_moe", layers=1), "none", group=dist.new_group([0])))
    return balance if isinstance(balance, str) else "went on"


def dealt(strategy: str, seeds: list[int], group: Any = None) -> dict[str, Any]:
    """A window of these micro-batches."""
    model = tiny_lm()
    balance = equipoise.attach(model, strategy, group=group)
    for seed in seeds:
        (model(_ids(seed)) + balance.loss()).backward()
    balance.step()
    return {"load": {name: load.tolist() for name, load in balance.load.items()}, "biases": balance.biases}


def forwards_first(rank: int, counts: tuple[int, int]) -> str:
    model = tiny_lm()
    balance = equipoise.attach(model, "lbl")
    losses = [model(_ids(seed)) + balance.loss() for seed in range(counts[rank])]
    torch.stack(losses).sum().backward()
    balance.step()
    return "went on"


def measured_alone(rank: int, strategy: str) -> Any:
    """An evaluation on rank 0 only, while rank 1 trains on."""
    model = tiny_lm()
    balance = equipoise.attach(model, strategy)
    if rank == 0:
        with balance.measuring():
            model(_ids(0))
        return "measured"
    (model(_ids(1)) + balance.loss()).backward()
    balance.step()
    return "stepped"


def evaluation_that_raises(rank: int, error_of: type[Exception]) -> list[Any]:
    """On rank 1, which catches it; then a window."""
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free")
    found: list[Any] = []
    try:
        with balance.measuring():
            model(_ids(rank))
            if rank == 1:
                raise error_of("no evaluation")
    except (ArithmeticError, EquipoiseError) as error:
        found.append(str(error))
    model(_ids(rank)).backward()
    balance.step()
    return [*found, int(balance.metrics()["tokens"])]


def after_a_window_that_failed(rank: int, strategy: str) -> list[Any]:
    """Rank 1 has no forward in the first window; both catch the error and go on."""
    model = tiny_lm()
    balance = equipoise.attach(model, strategy)
    found: list[Any] = []
    for window in range(6):
        try:
            if window or rank == 0:
                (model(_ids(2 * window + rank)) + balance.loss()).backward()
            balance.step()
            found.append(int(balance.metrics()["tokens"]))
        except EquipoiseError as error:
            found.append(str(error))
    return found


def attached_too_early(rank: int) -> str:
    initialised, pool._is_initialised = pool._is_initialised, lambda: False
    try:
        model = tiny_lm()
        balance = equipoise.attach(model, "loss-free")
    finally:
        pool._is_initialised = initialised
    model(_ids(rank)).backward()
    return str(said(balance.step))


def groups_that_come_and_go(rank: int) -> tuple[int, int]:
    """Attach beside a group that is destroyed, and after it; the number of process groups before and after."""
    before = len(dist.distributed_c10d._world.pg_names)
    for _ in range(3):
        group = dist.new_group()
        model = tiny_lm()
        balance = equipoise.attach(model, "none")
        dist.destroy_process_group(group)
        balance.detach()
        equipoise.attach(model, "none").detach()
    return before, len(dist.distributed_c10d._world.pg_names)


def loaded_on_one_rank(rank: int) -> list[list[float]]:
    """Rank 0 loads a bias into the model after attach; DDP's broadcast takes it to rank 1. Two windows."""
    inner = tiny_lm()
    balance = equipoise.attach(inner, "loss-free:rate=1e-2,rule=sign")
    model = nn.parallel.DistributedDataParallel(inner)
    gate = inner.blocks[0].gate
    if rank == 0:
        bias = torch.tensor([5.0, 0.0, 1.0, -1.0, 0.5, 0.25])
        gate.load_state_dict({**gate.state_dict(), "e_score_correction_bias": bias})
    for window in range(2):
        (model(_ids(2 * window + rank)) + balance.loss()).backward()
        balance.step()
    return [bias.tolist() for bias in balance.biases.values()]


def tensor_router(rank: int) -> str:
    """A router whose weights tensor parallelism has made DTensors."""
    mesh = init_device_mesh("cpu", (2,))
    model = tiny_lm()
    distribute_module(model.blocks[1].gate, mesh)  # replicated
    hidden = distribute_tensor(torch.randn(4, 8), mesh)
    balance = equipoise.attach(model.blocks[1], "none", group=dist.new_group([rank], use_local_synchronization=True))
    assert isinstance(balance, equipoise.Balance)
    return str(said(model.blocks[1].gate, hidden))


# ---- how often the ranks talk, and how much ----


class Deep(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.routers = nn.ModuleList(Router(4, EXPERTS, 2) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for router in self.routers:
            x = x + router(x)[1].sum()
        return x.sum()


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the collectives of torch that are begun meanwhile, whoever asks for them."""
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter", "gather", "scatter")
    names += ("reduce", "all_to_all", "all_to_all_single", "reduce_scatter_tensor", "barrier", "all_gather_object")
    seen: list[str] = []
    plain = {name: getattr(dist, name) for name in names}
    for name, function in plain.items():
        setattr(
            dist, name, lambda *args, name=name, function=function, **kw: (seen.append(name), function(*args, **kw))[1]
        )
    try:
        yield seen
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def traffic(layers: int, strategy: str) -> tuple[int, int, int]:
    """Collectives of one window of three micro-batches: as they were begun, as ``metrics`` says, and the bytes."""
    torch.manual_seed(0)
    model = Deep(layers).train()
    balance = equipoise.attach(model, strategy)
    with counted() as seen:
        for _ in range(3):
            (model(torch.randn(5, 4)) + balance.loss()).backward()
        balance.step()
    metrics = balance.metrics()
    return len(seen), int(metrics["collectives"]), int(metrics["collective_bytes"])


# ---- steps that are skipped ----


def skipped_on(rank: int, ranks: tuple[int, ...], as_tensor: bool, strategy: str) -> list[tuple[bool, int]]:
    """Of two windows, the second of which is applied: whether the biases have moved, and the assignments counted. All
    tokens are the same, so that no rule can take the load for chance."""
    model = tiny_lm()
    balance = equipoise.attach(model, strategy)
    found = []
    for window in range(2):
        (model(torch.full((2, 8), 3)) + balance.loss()).backward()
        applied: bool | Tensor = window == 1 or rank not in ranks
        balance.step(torch.tensor(applied) if as_tensor else applied)
        moved = any(bool(bias.any()) for bias in balance.biases.values())
        found.append((moved, int(sum(load.sum() for load in balance.load.values()))))
    return found


def scaled(rank: int) -> list[tuple[bool, bool]]:
    """Under a GradScaler whose first gradient overflows on rank 1: whether the weights and the biases moved."""
    inner = tiny_lm()
    balance = equipoise.attach(inner, "loss-free:rate=1e-2,rule=sign+lbl:coefficient=0.1")
    model = nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for window in range(2):
        weights = [p.detach().clone() for p in inner.parameters()]
        biases = [bias.clone() for bias in balance.biases.values()]
        loss = model(_ids(2 * window + rank)) + balance.loss()
        if window == 0 and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        balance.step(applied=scaler.get_scale() >= scale)
        found.append(
            (
                not all(map(torch.equal, weights, inner.parameters())),
                not all(map(torch.equal, biases, balance.biases.values())),
            )
        )
    return found


class Broken(torch.optim.SGD):
    """Raises in its first step, after the backward."""

    raised = False

    def step(self, closure: Any = None) -> None:
        if not self.raised:
            self.raised = True
            raise ArithmeticError("no step")
        super().step(closure)


def after_an_optimizer_that_raises(seeds: list[int], group: Any = None) -> dict[str, Any]:
    """The window that raises is closed without moving anything, the next one counts its own tokens only."""
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free:rate=1e-2,rule=sign", group=group)
    optimizer = Broken(model.parameters(), lr=0.0)
    balance.follow(optimizer)
    for window in range(2):
        for seed in seeds:
            (model(_ids(10 * window + seed)) + balance.loss()).backward()
        try:
            optimizer.step()
        except ArithmeticError:
            assert not any(bias.any() for bias in balance.biases.values())
            balance.step(applied=False)
            assert not any(bias.any() for bias in balance.biases.values())
    return {"load": {name: load.tolist() for name, load in balance.load.items()}, "biases": balance.biases}


def with_a_short_last_window(seeds: list[int], group: Any = None) -> list[list[int]]:
    """Three micro-batches, then what is left over: one on each rank, first with an optimizer's step, then without."""
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free:rate=1e-2,rule=sign+lbl:coefficient=0.1", group=group)
    found = []
    for numbers, applied in ((seeds, True), (seeds[:1], True), (seeds[1:2], False)):
        for seed in numbers:
            (model(_ids(seed)) + balance.loss()).backward()
        balance.step(applied)
        found.append([load.tolist() for load in balance.load.values()])
        found.append([bias.tolist() for bias in balance.biases.values()])
    return found


def a_rank_that_never_comes(rank: int) -> str:
    """The others wait as long as the group that was given to attach does."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free", group=group)
    if rank == 1:
        dist.barrier()  # on torch's own group: comes when the other has given up
        return "stayed away"
    try:
        model(_ids(0)).backward()
        balance.step()
        return "went on"
    except RuntimeError as error:
        return f"raised {error}"
    finally:
        dist.barrier()


def everything(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {counts: said(_window, rank, counts) for counts in ((2, 2), (2, 3), (3, 2), (1, 0), (0, 2))}
    for strategy in ("lbl+quantile", "lbl+loss-free:rule=sign,scope=micro_batch"):  # statistics besides the counts
        found[strategy] = said(_window, rank, (2, 3), strategy)
    for strategy in ("loss-free", "quantile", "quantile:bins=0", "loss-free:rule=sign,scope=micro_batch"):
        found["one calls nothing", strategy] = said(_window, rank, (2, 0), strategy)
    for strategy in UNEQUAL:
        found["unequal", strategy] = dealt(strategy, [0, 1, 2] if rank == 0 else [3])
    for layers in LAYERS:
        for strategy in SETTINGS if layers < 64 else SETTINGS[:1] + SETTINGS[-1:]:
            found["traffic", layers, strategy] = traffic(layers, strategy)
    for strategy in ("loss-free:rate=1e-2,rule=sign", "quantile", "lbl+loss-free:rate=1e-2,rule=momentum"):
        for ranks in ((), (1,), (0, 1)):
            for as_tensor in (False, True):
                case = "skipped", ranks, as_tensor, strategy
                found[case] = skipped_on(rank, ranks, as_tensor, strategy)
    for counts in ((2, 4), (4, 2)):
        found["forwards first", counts] = said(forwards_first, rank, counts)
    for strategy in MEASURED_ALONE:
        found["measured alone", strategy] = said(measured_alone, rank, strategy)
    for strategy in ("loss-free", "lbl", "quantile"):
        found["goes on", strategy] = after_a_window_that_failed(rank, strategy)
    for strategy in PARTIAL:
        found["partial", strategy] = one_layer_on_one_rank([rank], strategy)
    for error_of in (ArithmeticError, EquipoiseError):
        found["evaluation", error_of.__name__] = evaluation_that_raises(rank, error_of)
    found["early"] = attached_too_early(rank)
    found["groups"] = groups_that_come_and_go(rank)
    found["one loads"] = loaded_on_one_rank(rank)
    found["tensor router"] = tensor_router(rank)
    found["scaled"] = scaled(rank)
    found["raises"] = after_an_optimizer_that_raises([rank, 2 + rank])
    found["short"] = with_a_short_last_window([rank, 2 + rank, 4 + rank])
    found["start"], found["others"] = said(_unequal_start, rank), _of_others(rank)
    found["never"] = a_rank_that_never_comes(rank)
    return found
