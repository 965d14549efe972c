"""One step under each trainer of TRL, on ranks that have unequal tokens."""

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from trl_runs import COEFFICIENT, Watch, difference, model_for, train

from equipoise.integrations import EquipoiseCallback

STRATEGY = ("loss-free:rule=sign,rate=1e-2", f"lbl:scope=global_batch,coefficient={COEFFICIENT}")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "sft, tokens of each rank": ("sft", dict(average_tokens_across_devices=False)),
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "reward": ("reward", {}),
    "grpo": ("grpo", {}),
}


def _training(case: str) -> dict[str, Any]:
    """One step. The gradient of the balancing loss is the difference of two trainings, with it and without."""
    kind, options = CASES[case]
    model, without, callback = model_for(kind).double(), Watch(), EquipoiseCallback(*STRATEGY)
    train(kind, copy.deepcopy(model), [EquipoiseCallback("none"), without], max_steps=1, **options)
    watch = Watch(callback)
    train(kind, model, [callback, watch], max_steps=1, **options)
    callback.detach()
    return {
        "gradient": difference(watch.gradients[0], without.gradients[0]),
        "batches": watch.batches[0],
        "load": watch.load[0],
        "biases": watch.biases[0],
    }


def everything(rank: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29513"}  # the process group exists already
    torch.set_num_threads(1)
    results = {case: _training(case) for case in CASES}
    dist.barrier()
    return results
