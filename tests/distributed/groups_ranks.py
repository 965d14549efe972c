"""Four ranks that hold tokens, layers, experts and weights in every usual way; importable by spawned ranks."""

from datetime import timedelta
from typing import Any

import pipeline_ranks
import table_ranks
import torch
import torch.distributed as dist
from models import DIM, EXPERTS, VOCAB, tiny_lm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import equipoise

STRATEGY = "loss-free:rate=1e-2,rule=sign+lbl:coefficient=0.5"
LENGTH = 8
PIPELINE = pipeline_ranks.Case("gpipe", told=False, checkpointed=False, dense_first=True)


def rows(number: int) -> Tensor:
    """A micro-batch of two rows."""
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(number))


def step_on(model: nn.Module, balance: equipoise.Balance, inputs: list[Tensor]) -> dict[str, Any]:
    """One window; gradients as they lie on this rank."""
    losses = [model(ids) + balance.loss() for ids in inputs]
    (torch.stack(losses).sum() / len(losses)).backward()
    balance.step()
    return {
        "load": {name: load.tolist() for name, load in balance.load.items()},
        "biases": balance.biases,
        "tokens": balance.metrics()["tokens"],
        "gradients": {n: table_ranks.full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def mean_over(gradients: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """What DDP does to them."""
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return gradients


def alone(numbers: list[int], model: nn.Module | None = None) -> dict[str, Any]:
    """What one process comes to with these micro-batches."""
    model = tiny_lm() if model is None else model
    return step_on(model, equipoise.attach(model, STRATEGY), [rows(number) for number in numbers])


def hybrid_shards(rank: int) -> dict[str, Any]:
    """HSDP: replicas of shards; all four ranks hold different tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = tiny_lm()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return step_on(model, equipoise.attach(model, STRATEGY, group=mesh), [rows(rank), rows(4 + rank)])


def split_sequences(rank: int) -> dict[str, Any]:
    """Context or sequence parallelism: two ranks share each row, half of its tokens each. The two dimensions that hold
    different tokens do not lie side by side in the mesh."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "tp", "cp"))
    model = tiny_lm()
    balance = equipoise.attach(model, STRATEGY, group=mesh["dp", "cp"])
    row, half = mesh["dp"].get_local_rank(), mesh["cp"].get_local_rank()
    mine = [rows(number).chunk(2, 1)[half] for number in (row, 2 + row)]
    found = step_on(model, balance, mine)
    return {**found, "gradients": mean_over(found["gradients"], dist.group.WORLD)}


class Dense(nn.Module):
    """Two layers that tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def with_dense_layers() -> nn.Module:
    model = tiny_lm()
    for block in model.blocks:
        block.out = Dense()
    return model


def tensor_parallel(rank: int, dimension: str | None = "dp") -> dict[str, Any]:
    """Two ranks hold the same tokens and half of the dense weights each. ``dimension=None``: as if they did not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = with_dense_layers()
    for block in model.blocks:
        parallelize_module(block.out, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    balance = equipoise.attach(model, STRATEGY, group=mesh if dimension is None else mesh[dimension])
    row = mesh["dp"].get_local_rank()
    found = step_on(model, balance, [rows(row), rows(2 + row)])
    return {**found, "gradients": mean_over(found["gradients"], mesh["dp"].get_group())}


def summed(tensor: Tensor, group: Any) -> Tensor:
    tensor = tensor.contiguous().clone()
    dist.all_reduce(tensor, group=group)
    return tensor


def gathered(tensor: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


class Gather(torch.autograd.Function):
    """Everybody's rows; everybody's gradient of the rows from here comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = summed(grad, ctx.group).chunk(dist.get_world_size(ctx.group))
        return parts[dist.get_group_rank(ctx.group, dist.get_rank())], None


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class Sharded(nn.Module):
    """The experts of a block, half of them on each of two ranks: tokens and weights are gathered, what the experts here
    make of them is summed, and every rank keeps its own part."""

    def __init__(self, block: nn.Module, mesh: Any):
        super().__init__()
        self.gate, self.out = block.gate, block.out
        self.group = mesh.get_group()
        self.size, self.place = mesh.size(), mesh.get_local_rank()
        self.first = self.place * EXPERTS // self.size
        mine = slice(self.first, self.first + EXPERTS // self.size)
        self.experts = nn.Parameter(block.experts.detach()[mine].clone())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        _, weights, expert_ids = self.gate(flat)
        ids = gathered(expert_ids, self.group) - self.first
        weights, everyones = Gather.apply(weights, self.group), Gather.apply(flat, self.group)
        here = (ids >= 0) & (ids < len(self.experts))
        mixed = self.experts[ids.clamp(0, len(self.experts) - 1)] * (weights * here)[..., None]
        mixed = Sum.apply(everyones * mixed.sum(-2), self.group).chunk(self.size)[self.place]
        return x + self.out(mixed.view_as(x))


def expert_parallel(rank: int) -> dict[str, Any]:
    """All four ranks hold different tokens; the experts are cut over two of them and there twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = tiny_lm()
    model.blocks = nn.ModuleList(Sharded(block, mesh["ep"]) for block in model.blocks)
    found = step_on(model, equipoise.attach(model, STRATEGY), [rows(rank), rows(4 + rank)])
    gradients = found["gradients"]
    experts = {name: gradients.pop(name) / 2 for name in list(gradients) if name.endswith("experts")}
    everyone = mean_over(gradients, dist.group.WORLD)
    for name, gradient in mean_over(experts, mesh["dp"].get_group()).items():  # of both ranks' tokens already
        everyone[name] = gathered(gradient, mesh["ep"].get_group())
    return {**found, "gradients": everyone}


def pipelines(rank: int) -> dict[str, Any]:
    """Two pipelines of two stages, the first of which has no mixture-of-experts layer."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, place = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    found = pipeline_ranks.pipelined(stage, PIPELINE, mesh["pp"].get_group(), mesh["dp"], place)
    return {**found, "gradients": mean_over(found["gradients"], mesh["dp"].get_group())}


def said(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        return f"went on with {function(*args, **kwargs)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Other(nn.Module):
    """A model with one block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = tiny_lm().blocks[0]


def shuffled(rank: int) -> str:
    """A mesh in whose dimensions the first rank is not the first by number."""
    order, names = [[3, 1], [0, 2]], ("dp", "cp")
    lines = [dist.new_group(line, timeout=timedelta(seconds=5)) for line in ([3, 0], [1, 2], *order)]
    mine = [lines[rank in (1, 2)], lines[2 + (rank in (0, 2))]]
    mesh = dist.DeviceMesh.from_group(mine, "cpu", mesh=order, mesh_dim_names=names)
    pool = equipoise.attach(tiny_lm(), "none", group=mesh)._pool
    return str(pool.group.group_name)


def refused(rank: int) -> dict[str, str]:
    """What cannot be, and what each rank says of it."""
    attach, odd = equipoise.attach, rank == 3
    others = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return {
        "strategies": said(attach, tiny_lm(), "loss-free:rate=2e-3" if odd else "loss-free"),
        "unknown strategy": said(attach, tiny_lm(), "loss-fee" if odd else "loss-free"),
        "models": said(attach, Other() if odd else tiny_lm(), "none"),
        "no model": said(attach, "model" if odd else tiny_lm(), "none"),
        "a stage without routers": said(attach, nn.Linear(2, 2) if odd else tiny_lm(), "none", allow_empty=True),
        "stages without routers": said(attach, nn.Linear(2, 2), "none", allow_empty=True),
        "where": said(attach, tiny_lm(), "none", where=lambda name, router: not odd),
        "biases": said(attach, tiny_lm(), "frozen", biases={"x": torch.zeros(EXPERTS)}),
        "group of others": said(attach, tiny_lm(), "none", group=others),
        "no such dimension": said(lambda: attach(tiny_lm(), "none", group=mesh["cp"])),
        "no group": said(attach, tiny_lm(), "none", group="dp"),
    }


def everything(rank: int) -> dict[str, Any]:
    return {
        "hybrid_shards": hybrid_shards(rank),
        "split_sequences": split_sequences(rank),
        "tensor_parallel": tensor_parallel(rank),
        "tensor_parallel, counted twice": tensor_parallel(rank, None),
        "expert_parallel": expert_parallel(rank),
        "pipelines": pipelines(rank),
        "shuffled": shuffled(rank),
        "refused": refused(rank),
    }
