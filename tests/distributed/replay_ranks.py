"""A window that one rank replays in part; a module of its own, since a spawned rank imports it."""

from contextlib import nullcontext

import torch
from dealt_ranks import ids
from models import EXPERTS, K, tiny_lm
from torch import Tensor

import equipoise

LOSS = "+lbl:scope=global_batch,coefficient=0.1"


def record(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 16, 2, EXPERTS, generator=generator).topk(K).indices


def replays_on_one_rank(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """By strategy, the biases and counts after a live window, one of which rank 1 replays the second half, another."""
    outcome = {}
    for loss in ("", LOSS):  # with and without a collective for each micro-batch
        model = tiny_lm()
        balance = equipoise.attach(model, f"loss-free:rate=0.1,rule=sign{loss}")
        steps = []
        for window in range(3):
            for number in range(2):
                is_replayed = window == rank == number == 1
                with balance.replay(record(7)) if is_replayed else nullcontext():
                    (model(ids(10 * window + 2 * number + rank)) + balance.loss()).backward()
            balance.step()
            steps.append({**balance.biases, "load": torch.cat(list(balance.load.values()))})
        outcome[loss] = steps
    return outcome
