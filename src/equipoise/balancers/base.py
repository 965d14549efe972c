"""The interface of a balancer: one mechanism, and what it may see.

A balancer never sees the model, the optimizer or the mesh. It is a specification until ``attach`` copies it and calls
``prepare`` with the layers it is for; layers with the same number of experts and the same gate share one copy, whose
state is stacked, ``(layers, experts)``.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import Routing

__all__ = ["Balancer", "Layers", "check_number"]

SCOPES = ("sequence", "micro_batch", "global_batch")
POOLINGS = ("window", "previous")


@dataclass(frozen=True)
class Layers:
    """The layers that one copy of a balancer is for."""

    gate: str  # softmax, sigmoid, sqrt_softplus
    k: int
    offset: Float[Tensor, "layers experts"]  # what the model's own slots hold, float32; zero where it has none


class Balancer:
    """One mechanism. Subclasses are final and override what they need; every hook is a no-op here.

    ``name`` is what strategy strings call it; ``scope`` says whose counts reach ``loss``; ``coefficient`` weighs it.
    """

    name: str = ""
    scope: str = "global_batch"
    pooling: str = "window"
    coefficient: float = 0.0

    def prepare(self, layers: Layers) -> None:
        """Takes up the state for these layers. Called once, on a copy, by ``attach``."""

    def offset(self) -> Float[Tensor, "layers experts"] | None:
        """Added to the scores for the choice only. The tensor itself is the state: it is moved, saved and loaded."""
        return None

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""] | None:
        """One layer's loss, without the coefficient: a mean over the unmasked tokens of ``routing``, differentiable in
        its logits. ``load`` holds the counts of the balancer's scope (None for ``sequence``)."""
        return None

    def update(self, load: Int[Tensor, "layers experts"]) -> None:
        """Moves the offset, in place, by the pooled load of the window that ends."""

    @property
    def has_offset(self) -> bool:
        return type(self).offset is not Balancer.offset

    @property
    def has_loss(self) -> bool:
        return type(self).loss is not Balancer.loss

    def notes(self, num_steps: int) -> list[str]:
        """What a user should know before a run of this many steps: a rate too small for it, for instance."""
        return []

    def __str__(self) -> str:
        """The strategy string that makes this balancer again; options at their default are left out."""
        options = []
        for key, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, key)
            if value != parameter.default:
                options.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
        return (self.name or type(self).__name__) + (":" + ",".join(options) if options else "")


def check_number(name: str, value: Any, *, positive: bool) -> float:
    """A finite number above zero (or not below it), or an error that says so."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number: got {value!r}.")
    if value < 0 or (positive and value == 0):
        raise ValueError(
            f"{name} must be {'above' if positive else 'at least'} 0: got {value!r}."
            + (" To switch balancing off, use the strategy none." if positive else "")
        )
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}.")
    return value


def check_load(load: Tensor, state: Tensor) -> None:
    if load.shape != state.shape or load.dtype != torch.int64:
        raise ValueError(
            f"load must hold one int64 count per expert of each layer: expected shape {tuple(state.shape)}, got "
            f"{tuple(load.shape)} of {load.dtype}. Under expert parallelism pass the counts of all experts, not only "
            "those on this rank."
        )
