"""Two ranks with unequal numbers of inputs, as DDP's ``join`` allows them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from models import VOCAB, tiny_lm
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer

import equipoise

Blocks = Callable[[Any, Any], AbstractContextManager[Any]]
REFUSED: dict[str, Blocks] = {
    "join": lambda ddp, optimizer: ddp.join(),
    "Join": lambda ddp, optimizer: Join([ddp, optimizer]),
}
ALLOWED: dict[str, Blocks] = {
    "none": lambda ddp, optimizer: nullcontext(),
    "switched off": lambda ddp, optimizer: ddp.join(enable=False),
    "all stop with the first": lambda ddp, optimizer: ddp.join(throw_on_early_termination=True),
}


def _train(rank: int, block: Blocks, num_inputs: int, pooled: bool) -> tuple[str, int]:
    """What a training says, and the assignments that were counted."""
    ddp = nn.parallel.DistributedDataParallel(tiny_lm())
    optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.1)
    group = None if pooled else [dist.new_group([other]) for other in range(2)][rank]
    balance = equipoise.attach(ddp, "loss-free+lbl", group=group)
    counted, said = 0, "went on"
    try:
        with block(ddp, optimizer):
            for number in range(num_inputs):
                ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2 * number + rank))
                (ddp(ids) + balance.loss()).backward()
                optimizer.step()
                optimizer.zero_grad()
                balance.step()
                counted += sum(int(load.sum()) for load in balance.load.values())
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    dist.barrier()
    return said, counted


def everything(rank: int) -> dict[str, tuple[str, int]]:
    found = {name: _train(rank, block, 1 + rank, pooled=True) for name, block in REFUSED.items()}
    found |= {name: _train(rank, block, 2, pooled=True) for name, block in ALLOWED.items()}
    found["each rank alone"] = _train(rank, REFUSED["Join"], 1 + rank, pooled=False)
    found["one stops"] = _train(rank, ALLOWED["all stop with the first"], 1 + rank, pooled=True)
    return found
