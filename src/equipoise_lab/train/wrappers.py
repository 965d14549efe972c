"""How a model is distributed over ranks: not at all, as a copy on each (DDP), or sharded (FSDP2)."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from equipoise.errors import UsageError

__all__ = [
    "check_wrapper",
    "copy_to_ranks",
    "find_wrapper",
    "full_tensor",
    "is_sharded",
    "shard",
    "state_to_save",
    "synchronising",
    "weights_digest",
]


def check_wrapper(wrapper: str, num_ranks: int) -> str:
    """The wrapper to use: ``auto`` becomes none or ddp. Raises UsageError if the number of ranks does not allow it."""
    if wrapper == "auto":
        return "none" if num_ranks == 1 else "ddp"
    if wrapper == "none" and num_ranks > 1:
        raise UsageError(
            f"--wrapper none needs one process: got {num_ranks} ranks. Use ddp or fsdp2, or start without torchrun."
        )
    if wrapper != "none" and num_ranks == 1:
        raise UsageError(
            f"--wrapper {wrapper} needs several ranks: got one process. Start them with torchrun, for example: "
            "torchrun --nproc-per-node 4 -m equipoise train --out runs/one"
        )
    return wrapper


def shard(model: nn.Module, num_ranks: int, device: torch.device) -> None:
    """Shards the parameters over the ranks, layer by layer, in place.

    A layer's parameters stay gathered from its forward to its backward, because all forwards of a step run before one
    backward.
    """
    mesh = init_device_mesh(device.type, (num_ranks,))
    kinds: Any = getattr(model, "_no_split_modules", None) or ()  # Transformers' class names of its layers
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def copy_to_ranks(model: nn.Module) -> nn.Module:
    """Wraps a model in DDP. Buffers are not broadcast: biases are equal on all ranks already."""
    with (
        warnings.catch_warnings()
    ):  # torch 2.13 renamed the option; the oldest torch that we support only has this name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def find_wrapper(model: nn.Module) -> tuple[str, int]:
    """The wrapper that a model really has, and its number of ranks."""
    if isinstance(model, DistributedDataParallel):
        return "ddp", model.process_group.size()
    if isinstance(model, FSDPModule):
        return "fsdp2", next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh.size()
    return "none", 1


def is_sharded(model: nn.Module) -> bool:
    """Whether all ranks must take part in every forward."""
    return isinstance(model, FSDPModule)


@contextmanager
def synchronising(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Sets whether a backward averages gradients over the ranks. Forward and backward must both run inside."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    skips_sync = isinstance(model, DistributedDataParallel) and not enabled
    with model.no_sync() if skips_sync else nullcontext():
        yield


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor, gathered if ``value`` is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def state_to_save(model: nn.Module) -> dict[str, Any] | None:
    """The full weights of a sharded model, on rank 0; None if the model holds them itself. Collective."""
    if not is_sharded(model):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def weights_digest(model: nn.Module) -> str:
    """A hash of all weights and buffers."""
    digest = hashlib.blake2b()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
