"""How a model is spread over ranks: not at all, a copy on each (DDP), or sharded (FSDP2)."""

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
    "digest",
    "find_wrapper",
    "full",
    "is_sharded",
    "shard",
    "state_to_save",
    "synchronising",
]


def check_wrapper(wrapper: str, num_ranks: int) -> str:
    """The wrapper that ``auto`` stands for, or the one that is asked for; UsageError where it cannot be."""
    if wrapper == "auto":
        return "none" if num_ranks == 1 else "ddp"
    if wrapper == "none" and num_ranks > 1:
        raise UsageError(
            f"--wrapper none must be one process: got {num_ranks} ranks. Take ddp or fsdp2, or start without torchrun."
        )
    if wrapper != "none" and num_ranks == 1:
        raise UsageError(
            f"--wrapper {wrapper} must have several ranks: got one process. Start them with torchrun, as in: torchrun "
            "--nproc-per-node 4 -m equipoise train --out runs/one"
        )
    return wrapper


def shard(model: nn.Module, num_ranks: int, device: torch.device) -> None:
    """Shards parameters over the ranks, layer by layer, in place.

    Parameters stay whole from a layer's forward to its backward: all forwards of a step run before one backward.
    """
    mesh = init_device_mesh(device.type, (num_ranks,))
    kinds: Any = getattr(model, "_no_split_modules", None) or ()  # Transformers' names of what is a layer
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def copy_to_ranks(model: nn.Module) -> nn.Module:
    """DDP around a model. Its buffers are not broadcast: biases are equal on all ranks already."""
    with warnings.catch_warnings():  # torch 2.13 has another name for it, which the oldest that we support has not
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def find_wrapper(model: nn.Module) -> tuple[str, int]:
    """What a model is really wrapped in, and over how many ranks."""
    if isinstance(model, DistributedDataParallel):
        return "ddp", model.process_group.size()
    if isinstance(model, FSDPModule):
        return "fsdp2", next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh.size()
    return "none", 1


def is_sharded(model: nn.Module) -> bool:
    """Whether all ranks must take part in every forward."""
    return isinstance(model, FSDPModule)


@contextmanager
def synchronising(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether gradients are averaged over the ranks after the backward of a forward inside; both must be inside."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    keeps_own = isinstance(model, DistributedDataParallel) and not wanted
    with model.no_sync() if keeps_own else nullcontext():
        yield


def full(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def state_to_save(model: nn.Module) -> dict[str, Any] | None:
    """The whole weights, on rank 0, where a sharded model does not hold them; collective. None where it does."""
    if not is_sharded(model):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def digest(model: nn.Module) -> str:
    """A hash of all weights and buffers."""
    found = hashlib.blake2b()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return found.hexdigest()
