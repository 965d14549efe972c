"""Metrics of the last closed window, as Python numbers for a log."""

from collections.abc import Mapping, Sequence
from itertools import chain, count

import torch
from torch import Tensor

from equipoise import metrics
from equipoise.counting.recorder import Recorder
from equipoise.counting.window import MicroBatch

__all__ = ["without_constants", "window_metrics"]

CONSTANTS = ("collectives", "collective_bytes")


def window_metrics(recorder: Recorder) -> dict[str, float]:
    """``Balance.metrics``."""
    closed = recorder.window.last
    if closed is None:
        return {}
    load = _with_tokens(recorder.by_name(closed.vector.cpu()))
    layers = [layer for layer in recorder.layers if layer.name in load]
    tokens = [float(load[layer.name].sum()) / layer.k for layer in layers]
    floors = [metrics.sampling_floor(n, layer.k, layer.num_experts) for n, layer in zip(tokens, layers, strict=True)]
    result = {
        "maxvio_batch": float(metrics.max_violation(load)),
        "maxvio_floor": sum(floors) / len(floors),
        "min_violation": float(metrics.min_violation(load)),
        "coefficient_of_variation": float(metrics.coefficient_of_variation(load)),
        "load_entropy": float(metrics.load_entropy(load)),
        "dead_experts": float(metrics.dead_experts(load)),
        "tokens": min(tokens),
    }
    if closed.micro_batches:  # none after a resume
        loads = (_with_tokens(recorder.by_name(m.vector.cpu())) for m in closed.micro_batches)
        result["maxvio_micro"] = float(torch.stack([metrics.max_violation(load) for load in loads]).nanmean())
        result |= _losses(closed.micro_batches, recorder)
    if recorder.biases.steers:
        result["bias_max"] = max(float(bias.abs().max()) for bias in recorder.biases.by_name().values())
    result["collectives"], result["collective_bytes"] = float(closed.collectives), float(closed.num_bytes)
    return result


def without_constants(values: Mapping[str, float]) -> dict[str, float]:
    """What a log of every step gets of ``Balance.metrics``: not what its strategy and its ranks fix for a whole run."""
    return {name: value for name, value in values.items() if name not in CONSTANTS}


def _losses(micro_batches: Sequence[MicroBatch], recorder: Recorder) -> dict[str, float]:
    """For each balancer with a loss, the mean over layers and micro-batches that had tokens."""
    balancers = recorder.losses.balancers
    if not balancers:
        return {}
    by_micro_batch: list[Tensor] = []
    for micro_batch in micro_batches:
        num_layers = range(len(recorder.layers))
        has_tokens = torch.stack([micro_batch.load(layer).any() for layer in num_layers])
        by_micro_batch.append(recorder.losses.values(micro_batch)[:, has_tokens])
    values, result = torch.cat(by_micro_batch, dim=-1), {}
    for balancer, of_balancer in zip(balancers, values, strict=True):
        names = (balancer.metric, f"{balancer.metric}_{balancer.scope}")
        more = (f"{names[-1]}_{number}" for number in count(2))
        name = next(name for name in chain(names, more) if name not in result)
        result[name] = float(of_balancer.mean()) if len(of_balancer) else 0.0
    return result


def _with_tokens(load: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers that received tokens, or every layer if none did."""
    return {name: counts for name, counts in load.items() if counts.any()} or load
