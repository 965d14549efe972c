"""A scenario: a small problem, its right answer, and why it is right."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise_lab.conformance.driver import Batch, Driver
from equipoise_lab.conformance.measure import Measurement

__all__ = ["RATE", "SCENARIOS", "Scenario", "logits", "rows_of", "scenario", "window"]

RATE = 1e-3
Problem = Callable[[type[Driver], int], Measurement]
SCENARIOS: dict[str, "Scenario"] = {}


@dataclass(frozen=True)
class Scenario:
    """A question to a framework.

    Attributes:
        name: on the command line and in tables.
        area: the heading that it stands under.
        question: what is asked, one sentence.
        why: why the answer is right, two sentences at most.
        defects: the numbers of the known defects that it finds.
        ranks: processes.
        problem: asks one framework on one rank.
    """

    name: str
    area: str
    question: str
    why: str
    defects: tuple[int, ...]
    ranks: int
    problem: Problem


def scenario(*defects: int, why: str, ranks: int = 1) -> Callable[[Problem], Problem]:
    """Registers a problem under its name, with hyphens. The first line of its docstring is the question."""

    def register(problem: Problem) -> Problem:
        name = problem.__name__.replace("_", "-")
        area = problem.__module__.rsplit(".", 1)[1].replace("_", " ")
        question = " ".join((problem.__doc__ or "").split())
        SCENARIOS[name] = Scenario(name, area, question, why, defects, ranks, problem)
        return problem

    return register


def logits(rows: int, length: int, seed: int, experts: int = 8, number: int = 1) -> Tensor:
    """Random hidden states ``[layers, rows, length, experts]`` that favour the first experts."""
    generator = torch.Generator().manual_seed(seed)
    favour = torch.linspace(0.8, -0.8, experts)
    return torch.randn(number, rows, length, experts, generator=generator) + favour


def rows_of(*lengths: int, of: int, seed: int, number: int = 1, experts: int = 8) -> Batch:
    """A micro-batch whose rows have so many tokens, each padded at its end to ``of``."""
    mask = torch.arange(of)[None] < torch.tensor(lengths)[:, None]
    return Batch(logits(len(lengths), of, seed, experts, number), None if bool(mask.all()) else mask)


def window(tokens: list[int], of: int, seed: int = 0) -> list[Batch]:
    """Micro-batches of one row each, with so many tokens, padded to ``of``."""
    return [rows_of(count, of=of, seed=seed + step) for step, count in enumerate(tokens)]
