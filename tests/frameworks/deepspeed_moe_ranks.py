"""Trainings of DeepSpeed's own MoE layers in an engine on two ranks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from frameworks.deepspeed_moe_models import Kind, MoENet, batches, whole_names
from frameworks.deepspeed_ranks import LR, RANKS, config, environment, gradients, last_violation
from plain_model import BOTH, Batch

import equipoise

LENGTHS = (9, 7)  # of the rows of each rank


class Case(NamedTuple):
    kind: Kind
    stage: int  # of ZeRO
    accumulated: int
    recomputes: str | None = None
    attach_first: bool = True

    @property
    def name(self) -> str:
        words = [f"k={self.kind.k}", "drops" * self.kind.drops, f"ep={self.kind.ep_size}", f"ZeRO {self.stage}"]
        words += [self.recomputes or "", "" if self.attach_first else "attached after"]
        return ", ".join(filter(None, words))


CASES = [
    Case(Kind(1, drops=False, use_rts=True), 0, 2),
    Case(Kind(2, drops=True), 1, 2),
    Case(Kind(3, drops=True), 2, 2, "not reentrant"),
    Case(Kind(2, drops=True), 2, 1, "reentrant", attach_first=False),
    Case(Kind(3, drops=False), 1, 2, "deepspeed"),
    Case(Kind(1, drops=False, ep_size=2, use_rts=True), 1, 2),
    Case(Kind(2, drops=False, ep_size=2), 2, 2, "not reentrant"),
    Case(Kind(2, drops=True, ep_size=2), 1, 1, attach_first=False),
    Case(Kind(3, drops=False, ep_size=2), 0, 2, "reentrant"),
    Case(Kind(3, drops=True, ep_size=2), 1, 2, "deepspeed"),
]


def data_of(kind: Kind, number: int) -> list[Batch]:
    """Rows of one length on all ranks, if a capacity is computed from it: DeepSpeed exchanges equal parts."""
    return batches(number, lengths=LENGTHS if kind.ep_size == 1 or not kind.drops else (9, 9))


def start(net: MoENet, strategy: str, settings: dict[str, Any], attach_first: bool = True) -> tuple[Any, Any]:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from equipoise.integrations.deepspeed import follow_engine

    balance = equipoise.attach(net, strategy) if attach_first else None
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(net.parameters()), "name": "all"})
    optimizer = torch.optim.SGD(groups, lr=LR)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    if balance is None:
        balance = equipoise.attach(engine, strategy)
    follow_engine(balance, engine)
    return engine, balance


def train(engine: Any, balance: Any, data: list[Batch], rank: int) -> Iterator[dict[str, Any]]:
    """What each optimizer step leaves behind."""
    for batch in data:
        loss = engine(**batch) + balance.loss()
        engine.backward(loss)
        is_boundary = engine.is_gradient_accumulation_boundary()
        gradient = whole_names(engine.module, gradients(engine.module), rank) if is_boundary else {}
        engine.step()
        if is_boundary:
            yield {"gradient": gradient, "biases": balance.biases, "load": balance.load}


def run_case(rank: int, case: Case, **options: Any) -> list[dict[str, Any]]:
    net = MoENet(case.kind, rank=rank if case.kind.ep_size > 1 else 0, recomputes=case.recomputes)
    settings = config(case.stage, case.accumulated, gradient_clipping=0.0, **options)
    engine, balance = start(net, BOTH, settings, case.attach_first)
    steps = list(train(engine, balance, data_of(case.kind, 12)[rank::RANKS], rank))
    balance.detach()
    return steps


def resumed(rank: int, kind: Kind, folder: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The third window at once, and after a checkpoint into other weights."""
    data, expert_rank = data_of(kind, 12)[rank::RANKS], rank if kind.ep_size > 1 else 0
    engine, balance = start(MoENet(kind, rank=expert_rank), BOTH, config(1, 2, gradient_clipping=0.0))
    list(train(engine, balance, data[:4], rank))
    engine.save_checkpoint(folder, tag=f"ep{kind.ep_size}", client_state={"balance": balance.state_dict()})
    (whole,) = train(engine, balance, data[4:], rank)
    balance.detach()
    engine, balance = start(MoENet(kind, seed=3, rank=expert_rank), BOTH, config(1, 2, gradient_clipping=0.0))
    _, client_state = engine.load_checkpoint(folder, tag=f"ep{kind.ep_size}")
    balance.load_state_dict(client_state["balance"])
    (after,) = train(engine, balance, data[4:], rank)
    balance.detach()
    return whole, after, balance.num_windows


def evened(rank: int, kind: Kind, strategy: str) -> float:
    torch.manual_seed(rank)  # for what is dropped
    engine, balance = start(MoENet(kind, rank=rank), strategy, config(1, 1))
    violation = last_violation(train(engine, balance, batches(20)[rank::RANKS] * 5, rank), 10)  # all batches once
    balance.detach()
    return violation


EVENED = (Kind(1, drops=True, ep_size=2, use_rts=True), Kind(2, drops=True, ep_size=2))


def everything(rank: int, folder: str) -> dict[Any, Any]:
    environment(rank)
    results: dict[Any, Any] = {case: run_case(rank, case) for case in CASES}
    results["bf16"] = run_case(rank, CASES[6], bf16={"enabled": True})
    for ep_size in (1, 2):
        results["resumed", ep_size] = resumed(rank, Kind(2, drops=True, ep_size=ep_size), folder)
    for kind in EVENED:
        for strategy in ("none", BOTH):
            results["evened", kind, strategy == "none"] = evened(rank, kind, strategy)
    return results
