"""Two pipeline stages on two ranks, and the same schedule by hand in one process; importable by spawned ranks."""

from functools import partial
from typing import Any, NamedTuple

import torch
from models import DIM, VOCAB, Block
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as contexts

import equipoise

MICRO_BATCHES, ROWS, LENGTH = 4, 2, 7
STRATEGY = "loss-free:rate=1e-2+lbl:coefficient=0.5+lbl:scope=micro_batch,coefficient=0.2+lbl:scope=sequence"
ONE_F_ONE_B = "0F0 0F1 1F0 1B0 0B0 0F2 1F1 1B1 0B1 0F3 1F2 1B2 0B2 1F3 1B3 0B3"


class Case(NamedTuple):
    schedule: str
    told: bool  # the stages are given the shapes of what they send and receive
    checkpointed: bool
    dense_first: bool  # the first stage has no mixture-of-experts layer


CASES = [
    Case(schedule, told, checkpointed, dense)
    for schedule in ("gpipe", "1f1b")
    for told in (True, False)
    for checkpointed in (False, True)
    for dense in (False, True)
]


class First(nn.Module):
    def __init__(self, checkpointed: bool, dense: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.block = nn.Linear(DIM, DIM) if dense else Block("sigmoid")
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


def recompute(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


class Last(nn.Module):
    def __init__(self, checkpointed: bool):
        super().__init__()
        self.block, self.head = Block("softmax"), nn.Linear(DIM, VOCAB)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:  # selectively: the tap is then recorded as one operation, whose token is recomputed too
            x = checkpoint(self.block, x, use_reentrant=False, context_fn=partial(contexts, recompute))
        else:
            x = self.block(x)
        return self.head(x)


def stages(case: Case) -> list[nn.Module]:
    torch.manual_seed(0)
    return [First(case.checkpointed, case.dense_first).train(), Last(case.checkpointed).train()]


def order(schedule: str, number: int) -> list[str]:
    """Forward (F) and backward (B) of which micro-batch on which stage, as in 0F2."""
    if schedule == "1f1b":
        assert number == MICRO_BATCHES
        return ONE_F_ONE_B.split(" ")
    forwards = [f"{stage}F{m}" for stage in (0, 1) for m in range(number)]
    return forwards + [f"{stage}B{m}" for stage in (1, 0) for m in range(number)]


def ids(step: int, place: int = 0) -> Tensor:
    """The batch of a pipeline; there are as many as data-parallel ranks."""
    generator = torch.Generator().manual_seed(10 * step + place)
    return torch.randint(0, VOCAB, (MICRO_BATCHES * ROWS, LENGTH), generator=generator)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def outcome(stage: nn.Module, balance: equipoise.Balance) -> dict[str, Any]:
    return {
        "load": {name: load.clone() for name, load in balance.load.items()},
        "biases": balance.biases,
        "gradients": {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None},
        "windows": balance.state_dict()["num_windows"],
    }


def by_hand(case: Case, pipelines: int = 1, steps: int = 2) -> list[dict[str, Any]]:
    """What each stage comes to in one process, with a ticket in every micro-batch of all pipelines."""
    both = stages(case)
    balances = [equipoise.attach(stage, STRATEGY, allow_empty=True) for stage in both]
    for step in range(steps):
        for stage in both:
            stage.zero_grad()
        parts = [part for place in range(pipelines) for part in ids(step, place).split(ROWS)]
        sent: dict[int, Tensor] = {}
        received: dict[int, Tensor] = {}
        roots: dict[tuple[int, int], Tensor] = {}
        for place, what, number in ((int(o[0]), o[1], int(o[2:])) for o in order(case.schedule, len(parts))):
            if what == "F" and place == 0:
                sent[number] = both[0](parts[number])
                roots[0, number] = balances[0].loss() / len(parts)
            elif what == "F":
                received[number] = sent[number].detach().requires_grad_()
                loss = loss_of(both[1](received[number]), parts[number]) + balances[1].loss()
                roots[1, number] = loss / len(parts)
            elif place == 1:
                roots[1, number].backward()
            else:
                (roots[0, number] + (sent[number] * received[number].grad).sum()).backward()
        for balance in balances:
            balance.step()
    return [outcome(stage, balance) for stage, balance in zip(both, balances, strict=True)]


def pipelined(rank: int, case: Case, group: Any, replicas: Any, place: int = 0, steps: int = 2) -> dict[str, Any]:
    """Stage ``rank`` of a pipeline over ``group``; ``replicas`` hold the same stage, this rank is number ``place``."""
    stage = stages(case)[rank]
    balance = equipoise.attach(stage, STRATEGY, group=replicas, allow_empty=True)
    balance.loss_scale = 1.0  # the schedule divides all gradients by the number of micro-batches
    hidden = torch.zeros(ROWS, LENGTH, DIM, requires_grad=True)
    shapes = {}
    if case.told:
        first, last = torch.zeros(ROWS, LENGTH, dtype=torch.long), torch.zeros(ROWS, LENGTH, VOCAB)
        shapes = {"input_args": (hidden if rank else first,), "output_args": (last if rank else hidden,)}
    part = PipelineStage(stage, rank, 2, torch.device("cpu"), group=group, **shapes)
    kind = ScheduleGPipe if case.schedule == "gpipe" else Schedule1F1B
    schedule = kind(part, MICRO_BATCHES, loss_fn=loss_of)
    for step in range(steps):
        stage.zero_grad()
        batch = ids(step, place)
        if rank == 0:
            schedule.step(batch)
        else:
            schedule.step(target=batch)
        balance.step()
    return outcome(stage, balance)


def everything(rank: int) -> dict[Case, Any]:
    alone = [torch.distributed.new_group([other]) for other in range(2)][rank]
    return {case: pipelined(rank, case, None, alone) for case in CASES}
