"""The same micro-batches dealt to any number of ranks; a module of its own, since a spawned rank imports it."""

import torch
from models import VOCAB, tiny_lm
from torch import Tensor

import equipoise


def ids(seed: int, rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def mask(seed: int, rows: int = 2, length: int = 16) -> Tensor:
    found = torch.ones(rows, length, dtype=torch.long)
    found[seed % rows, : seed % 5] = 0
    return found


def deal(rank: int, strategies: list[str], size: int) -> list[dict[str, Tensor]]:
    """Biases after two windows of four micro-batches, dealt to ``size`` ranks; the last is padding only."""
    found = []
    for strategy in strategies:
        for loss in ("", "+lbl:coefficient=0.1"):  # with and without a collective for each micro-batch
            model = tiny_lm()
            balance = equipoise.attach(model, strategy + loss)
            for window in range(2):
                for seed in range(rank, 4, size):
                    (model(ids(10 * window + seed), mask(seed) * (seed != 3)) + balance.loss()).backward()
                balance.step()
            found.append(balance.biases)
    return found
