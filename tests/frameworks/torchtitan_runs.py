"""Runs of torchtitan's Trainer, in this process or on several gloo ranks, and what each step gave."""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from frameworks import torchtitan_on_cpu as titan
from frameworks.torchtitan_reference import Given, Reference, Step
from torch import Tensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.moe import GroupedExperts

from equipoise.integrations.torchtitan import balanced

CHECKPOINTING = {"none": None, "full": FullAC.Config(), "selective": SelectiveAC.Config()}
LIMIT = 600  # seconds until ranks that wait for each other are stopped


class Case(NamedTuple):
    """A run. ``strategy`` has the coefficient 1 and the rate 0.02."""

    strategy: str = "loss-free:rate=0.02,rule=sign+lbl:scope=global_batch,coefficient=1"
    family: str = "deepseek"
    score: str = "softmax"
    num_layers: int = 3
    num_mtp: int = 0
    kinds: tuple[str, ...] = ("packed", "padded", "full")
    rows: int = 2
    accumulation: int = 2
    steps: int = 3
    checkpointing: str = "none"
    compiled: bool = False
    with_loss: bool = False
    data_parallel: int = 1
    num_ranks: int = 1
    has_context: bool = True  # of attention
    own_experts: bool = False  # torchtitan's, in bfloat16: nothing before the first router depends on them
    parallelism: tuple[tuple[str, Any], ...] = ()


class Ran(NamedTuple):
    initial: dict[str, Tensor]  # the weights, in full
    steps: list[dict[str, Any]]  # load, biases, gradients, tokens


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def full(value: Tensor) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


@contextmanager
def started(config: Any, *balancers: Any) -> Any:
    """A trainer in this process, which has a group of its own."""
    titan.prepare_process(port=free_port())
    trainer = (balanced(config, *balancers) if balancers else config).build()
    try:
        yield trainer
    finally:
        trainer.close()
        dist.destroy_process_group()


def config_of(case: Case, folder: Any) -> Any:
    return titan.trainer_config(
        folder,
        model=titan.model_config(case.family, case.score, case.num_layers, case.num_mtp),
        kinds=case.kinds,
        rows=case.rows,
        accumulation=case.accumulation,
        steps=case.steps,
        loss=titan.CrossEntropyLoss.Config() if case.with_loss else None,
        data_parallel=case.data_parallel,
        checkpointing=CHECKPOINTING[case.checkpointing],
        compiled=case.compiled,
        **dict(case.parallelism),
    )


def run(case: Case) -> Ran:
    """Trains, and keeps what each step gave. The environment says how to make the process group."""
    with tempfile.TemporaryDirectory() as folder, _replaced(case):
        trainer = balanced(config_of(case, folder), case.strategy).build()
        try:
            initial = {
                plain_name(name): full(value)
                for part in trainer.model_parts
                for name, value in part.state_dict().items()
            }
            batches, steps = trainer.batch_generator(trainer.dataloader), []
            for _ in range(case.steps):
                trainer.step += 1
                trainer.train_step(batches)
                steps.append(
                    {
                        "load": {k: v for balance in trainer.balances for k, v in balance.load.items()},
                        "biases": {k: v for balance in trainer.balances for k, v in balance.biases.items()},
                        "gradients": {
                            plain_name(name): full(p.grad)
                            for part in trainer.model_parts
                            for name, p in part.named_parameters()
                            if p.grad is not None
                        },
                    }
                )
        finally:
            trainer.close()
    return Ran(initial, steps)


@contextmanager
def _replaced(case: Case) -> Any:
    with ExitStack() as stack:
        if not case.has_context:
            stack.enter_context(titan.attention_without_context())
        if case.own_experts:
            stack.enter_context(patch.object(GroupedExperts, "forward", titan.OWN_EXPERTS))
        yield


def run_here(case: Case) -> Ran:
    titan.prepare_process(port=free_port())
    try:
        return run(case)
    finally:
        dist.destroy_process_group()


# ---- several ranks ----


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _rank(rank: int, num_ranks: int, port: int, folder: str, function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    titan.prepare_process(rank, num_ranks, port)
    try:
        result = function(*args)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/{rank}.part")  # all at once, so that nobody reads half of it
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
    os._exit(0)  # another rank may wait for this one in vain


def run_all(cases: tuple[Case, ...], ports: list[int]) -> list[Any]:
    """Several runs on the ranks that this one is of; a traceback in place of one that failed, and of those after it."""
    results: list[Any] = []
    for case, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        results.append(run(case))
        dist.destroy_process_group()
    return results


def save_in_a_pipeline(folder: str) -> dict[str, Tensor]:
    """Two steps on two stages, with a checkpoint at the end. The biases of this stage."""
    parallelism = (("pipeline_parallel_degree", 2), ("spmd_backend", "partial_dtensor"))
    case = Case(strategy="loss-free:rate=0.02,rule=momentum", rows=2, accumulation=1, steps=2, with_loss=True)
    config = config_of(case._replace(parallelism=parallelism, num_layers=4), folder)
    config.checkpoint = CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False)
    trainer = balanced(config, case.strategy).build()
    trainer.train()
    return trainer.balances[0].state_dict()


def on_ranks(num_ranks: int, function: Any, *args: Any) -> list[Any]:
    """``function(*args)`` on each rank; a traceback in place of what a rank could not return."""
    multiprocessing.set_forkserver_preload(["frameworks.torchtitan_runs"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, free_port(), folder, function, args)
        ranks = mp.start_processes(_rank, arguments, nprocs=num_ranks, start_method="forkserver", join=False)
        end = time.monotonic() + LIMIT
        while not ranks.join(timeout=1):
            if time.monotonic() >= end or _has_error(folder):
                time.sleep(1)  # the others may say what is wrong too
                for process in ranks.processes:
                    process.kill()
                break
        files = [Path(folder) / f"{rank}.pt" for rank in range(num_ranks)]
        return [torch.load(file, weights_only=False) if file.exists() else "did not end" for file in files]


def _has_error(folder: str) -> bool:
    return any(isinstance(torch.load(file, weights_only=False), str) for file in Path(folder).glob("*.pt"))


# ---- against the reference ----


def merged(parts: list[Ran]) -> Ran:
    """Of the stages of a pipeline, each of which knows its layers."""
    names = ("load", "biases", "gradients")
    steps = [
        {name: {key: value for part in parts for key, value in part.steps[n][name].items()} for name in names}
        for n in range(len(parts[0].steps))
    ]
    return Ran({key: value for part in parts for key, value in part.initial.items()}, steps)


def expected(case: Case, initial: dict[str, Tensor], ahead: Any = lambda layer: 0) -> tuple[list[Step], list[Any]]:
    """What each step must give, from the same weights; and the biases after each."""
    model = titan.model_config(case.family, case.score, case.num_layers, case.num_mtp).build()
    with torch.no_grad():
        model.init_weights()  # the buffers
    model.load_state_dict(initial)
    scope = "sequence" if "scope=sequence" in case.strategy else "global_batch"
    coefficient = 1.0 if "lbl" in case.strategy else 0.0
    rate = 0.02 if "loss-free" in case.strategy else 0.0
    reference = Reference(model, coefficient, scope, rate, case.with_loss)
    steps, biases, number = [], [], 0
    for _ in range(case.steps):
        by_index = []
        for _ in range(case.accumulation):
            number += 1
            kinds = [case.kinds[(number + rank) % len(case.kinds)] for rank in range(case.data_parallel)]
            rows = [titan.rows_of(1000 * number + rank, case.rows, kind) for rank, kind in enumerate(kinds)]
            by_index.append([Given(*micro_batch) for micro_batch in rows])
        with _replaced(case._replace(own_experts=False)):
            steps.append(reference.step(by_index, ahead))
        biases.append(reference.biases())
    return steps, biases


def distance(ours: dict[str, Tensor], reference: dict[str, Tensor], part: str = "") -> float:
    """Of all gradients of parameters with ``part`` in their name, relative, by norm."""
    names = [name for name in reference if part in name]
    assert names
    difference = sum(float((ours[name] - reference[name]).double().square().sum()) for name in names)
    return (difference / sum(float(reference[name].double().square().sum()) for name in names)) ** 0.5


def by_router(values: dict[str, Any]) -> dict[str, Any]:
    return {name.removesuffix(".router"): value for name, value in values.items()}
