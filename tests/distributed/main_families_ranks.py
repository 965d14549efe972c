"""What each rank of ``test_main_families.py`` does: one window of every main family, wrapped, attached or not."""

from typing import Any

import models
import torch
from models import FAMILIES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from equipoise import attach

WRAPPERS = ("ddp", "fsdp2")


def everything(rank: int) -> dict[tuple[str, str], list[list[torch.Tensor]]]:
    """By family and wrapper: loss, logits and gradients, not attached and attached."""
    return {
        (name, wrapper): [_run(name, wrapper, rank, attached) for attached in (False, True)]
        for name in sorted(FAMILIES)
        for wrapper in WRAPPERS
    }


def _run(name: str, wrapper: str, rank: int, attached: bool) -> list[torch.Tensor]:
    model = models.family(name, experts_implementation="eager")
    balance = attach(model, "loss-free+lbl:coefficient=0") if attached else None
    outer: Any = model
    if wrapper == "ddp":
        outer = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(rank))
    output = outer(input_ids=ids, labels=ids)
    loss = output.loss if balance is None else output.loss + balance.loss()
    loss.backward()
    if balance is not None:
        balance.step()
        assert all(load.sum() == 2 * 2 * 2 * 9 for load in balance.load.values()), "both ranks' tokens"
    gradients = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    gradients = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in gradients]
    return [output.loss.detach(), output.logits.detach(), *(grad.clone() for grad in gradients)]
