"""What spawned ranks of Megatron-Core do; each function returns figures of its rank."""

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from frameworks.megatron_models import (
    COEFFICIENT,
    LAYERS,
    MicroBatch,
    data_parallel,
    forget_scale,
    forward_backward,
    gpt,
    gradients,
    micro_batches,
    optimizer_of,
    start,
    stop,
)
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

from equipoise import EquipoiseError
from equipoise.integrations.megatron import attach, sharded_state_dict

STEPS = 2
RATE = 1e-2
# Rows of the micro-batches of each data parallel rank: how many of their tokens are no padding.
LENGTHS = [[(8, 3), (5, 8)], [(2, 2), (8, 8)]]


def batches_of(place: int, step: int, lengths: Sequence[Sequence[Sequence[int]]] = LENGTHS) -> list[MicroBatch]:
    return micro_batches(*lengths[place], seed=10 * step + place)


def part_of_context(batches: list[MicroBatch]) -> list[MicroBatch]:
    """The tokens of this context parallel rank: every second one of each row."""
    parts, place = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return [MicroBatch(*(values[:, place::parts].contiguous() for values in batch)) for batch in batches]


def train(
    scope: str,
    lengths: Any = LENGTHS,
    chunks: int = 1,
    form: str = "sum",
    ddp: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Steps of a strategy with a bias and a loss. The weights stay; so the gradient of every step can be compared."""
    forget_scale()
    if chunks > 1:
        model: Any = [data_parallel(gpt(vp_stage=stage, **options), **ddp or {}) for stage in range(chunks)]
    else:
        model = data_parallel(gpt(**options), **ddp or {})
    balance = attach(model, f"loss-free:rate={RATE}+lbl:scope={scope},coefficient={COEFFICIENT}")
    place, found = parallel_state.get_data_parallel_rank(), []
    for step in range(STEPS):
        for chunk in model if chunks > 1 else [model]:
            chunk.zero_grad_buffer()
        forward_backward(model, part_of_context(batches_of(place, step, lengths)), weight=0.0, form=form)
        balance.step()
        found.append((gradients(model), balance.load, balance.biases, balance.metrics()))
    return {"steps": found, "names": [layer.name for layer in balance.layers]}


def with_optimizer(distributed: bool) -> dict[str, Any]:
    """A few steps that move the weights, by Megatron's optimizer; the gradient of one of them is not finite."""
    forget_scale()
    model = data_parallel(gpt(), use_distributed_optimizer=distributed, overlap_grad_reduce=distributed)
    balance = attach(model, f"loss-free:rate={RATE}+lbl:coefficient={COEFFICIENT}")
    scaler = {"fp16": True, "initial_loss_scale": 64.0, "min_loss_scale": 1.0}
    optimizer = optimizer_of(model, use_distributed_optimizer=distributed, **scaler)
    place, found = parallel_state.get_data_parallel_rank(), []
    for step in range(4):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        batches = batches_of(place, step)
        weight = float("inf") if step == 2 and place == 1 else 1.0
        forward_backward(model, batches, weight=weight)
        is_applied, *_ = optimizer.step()
        balance.step(applied=is_applied)
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if "local_experts" not in name}
        found.append((is_applied, balance.load, balance.biases, weights))
    return {"steps": found, "own update": own_update_moves(model)}


def own_update_moves(model: Any) -> bool:
    """Whether Megatron's own update, which finalize_model_grads calls, moves a bias."""
    before = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    _update_router_expert_bias([model], model.config, group)
    after = [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    return not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def save_stage(folder: str) -> Any:
    """A stage of a pipeline saves its model and its Balance into a checkpoint of all."""
    balance, model = _stage()
    forward_backward(data_parallel(model), batches_of(0, 0))
    balance.step()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "equipoise": sharded_state_dict(balance)}, folder)
    again, new_model = _stage()
    state = {"model": new_model.sharded_state_dict(), "equipoise": sharded_state_dict(again)}
    state = dist_checkpointing.load(state, folder)
    again.load_state_dict(state["equipoise"])
    return balance.state_dict(), again.state_dict()


def _stage() -> Any:
    model = gpt()
    return attach(model, f"loss-free:rate={RATE},rule=momentum+lbl"), model


def refused(scope: str) -> str:
    try:
        attach(gpt(), f"lbl:scope={scope}")
    except EquipoiseError as error:
        return str(error)
    return ""


# By name: sizes of the process groups, what to run, its options.
TENSOR, CONTEXT, EXPERT = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "context", "expert_model"))
PIPELINE = {"pipeline_model_parallel_size": 2}
PER_TOKEN = {"calculate_per_token_loss": True}
RUNS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    **{f"data {scope}": ({}, train, {"scope": scope}) for scope in ("global_batch", "micro_batch", "sequence")},
    "data per token": ({}, train, {"scope": "global_batch", **PER_TOKEN}),
    "expert": (EXPERT, train, {"scope": "global_batch", "moe_token_dispatcher_type": "alltoall"}),
    "tensor": (TENSOR, train, {"scope": "global_batch"}),
    "tensor per token": (TENSOR, train, {"scope": "global_batch", **PER_TOKEN}),
    "tensor sequence": (TENSOR, refused, {"scope": "sequence"}),
    "context": (CONTEXT, train, {"scope": "global_batch", "form": "mean", "has_attention": False}),
    "context per token": (CONTEXT, train, {"scope": "global_batch", "has_attention": False, **PER_TOKEN}),
    "pipeline": (PIPELINE, train, {"scope": "global_batch", "deallocate_pipeline_outputs": True}),
    "pipeline sequence": (
        PIPELINE,
        train,
        {
            "scope": "sequence",
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "interleaved": (
        PIPELINE | {"virtual_pipeline_model_parallel_size": 2},
        train,
        {"scope": "micro_batch", "chunks": 2, "num_layers": 2 * LAYERS},
    ),
    "dense first stage": (PIPELINE, train, {"scope": "global_batch", "moe_layer_freq": [0, 1]}),
    "distributed optimizer": ({}, with_optimizer, {"distributed": True}),
}


RUNS_OF_FOUR: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "tensor and data": (TENSOR, train, {"scope": "global_batch"}),
    "pipeline and expert": (PIPELINE | EXPERT, train, {"scope": "global_batch"}),
}


def everything(rank: int, runs: Any) -> dict[str, Any]:
    """By name of the run; a traceback in place of what failed."""
    results: dict[str, Any] = {}
    for name, (sizes, run, options) in runs.items():
        start(**sizes)
        try:
            results[name] = run(**options)
        except Exception:
            results[name] = traceback.format_exc()
        stop()
    return results


def two(rank: int, folder: str) -> dict[str, Any]:
    return everything(rank, {**RUNS, "saved stages": (PIPELINE, save_stage, {"folder": folder})})


def four(rank: int) -> dict[str, Any]:
    return everything(rank, RUNS_OF_FOUR)
