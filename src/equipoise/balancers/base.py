"""The interface of a balancer: one mechanism, and what it may see.

A balancer never sees the model, the optimizer or the mesh. It is a specification until ``attach`` copies it and calls
``prepare`` with the layers it is for; layers with the same number of experts and the same score function share one copy, whose
state is stacked, ``(layers, experts)``.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import Routing

__all__ = ["Balancer", "LayerStack", "check_bool", "check_choice", "check_load", "check_number", "check_whole"]

SCOPES = ("sequence", "micro_batch", "global_batch")
POOLINGS = ("window", "previous")


@dataclass(frozen=True)
class LayerStack:
    """The layers that one copy of a balancer is for."""

    score_function: str  # softmax, sigmoid, sqrt_softplus
    k: int
    bias: Float[Tensor, "layers experts"]  # what the model's own slots hold, float32; zero where it has none
    selection: str = "scores"  # or logits: what the bias is added to


class Balancer:
    """One mechanism. Subclasses are final and override what they need; every hook is a no-op here.

    ``name`` is what strategy strings call it, ``metric`` what the logs call its loss. ``scope`` says whose counts reach
    ``loss``: of the ``global_batch``, the ``micro_batch``, or none (``sequence``, ``token``); ``pooling`` is ``window``
    or ``previous``, as for ``LoadBalancingLoss``. ``coefficient`` weighs the loss. Arguments of the constructor are
    kept under their own names: the strategy string is made of them. With ``multiplies`` the choice is made by
    ``score * (1 + bias)`` instead of ``score + bias``.
    ``gathers`` puts statistics one after another, for small batches, where others are summed.
    """

    name: str = ""
    metric: str = "loss"
    scope: str = "global_batch"
    pooling: str = "window"
    coefficient: float = 0.0
    multiplies: bool = False
    gathers: bool = False

    def prepare(self, layers: LayerStack) -> None:
        """Takes up the state for these layers. Called once, on a copy, by ``attach``.

        ``layers`` has ``score_function``, ``k``, ``selection`` and ``bias`` [layers, experts], what the model's slots hold:
        clone it.
        """

    def bias(self) -> Float[Tensor, "layers experts"] | None:
        """Moves the choice only, never the weights. The tensor itself is the state: it is moved, saved and loaded."""
        return None

    def state(self) -> dict[str, Float[Tensor, "layers experts"]]:
        """What ``update`` moves besides the bias, by name: saved, loaded and held back with it. Zero at the start."""
        return {}

    def statistic(self, routing: Routing, row: int) -> Tensor | None:
        """What ``update`` must know of one counted router call of layer ``row`` besides its load: int64 of a fixed
        shape, 0 for masked tokens. It is summed over the calls of the window and over the ranks."""
        return None

    def micro_batch_statistic(self, load: Int[Tensor, "layers experts"]) -> Int[Tensor, "layers numbers"] | None:
        """The same of one micro-batch on one rank, from its load; always, or never (asked once after ``prepare``)."""
        return None

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""] | None:
        """One layer's loss, without the coefficient: a mean over the unmasked tokens of ``routing``, differentiable in
        its logits. ``load`` holds the counts of the balancer's scope (None for ``sequence`` and ``token``)."""
        return None

    def score_gradient(
        self, routing: Routing, load: Int[Tensor, " experts"] | None, factor: float | Float[Tensor, ""] = 1.0
    ) -> Float[Tensor, "tokens experts"] | None:
        """The gradient of ``factor * loss`` by ``routing.scores``, for a loss that has a short one in closed form and
        depends on the logits through the scores only; None, and autograd takes it, which is slower."""
        return None

    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        """Moves the bias, in place, at the end of a window.

        ``load`` is the window's, over all ranks; ``statistic`` what the hook gave, pooled, by layer; ``window`` the
        number of windows that ended before.
        """

    @property
    def has_bias(self) -> bool:
        return type(self).bias is not Balancer.bias

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
            value = getattr(self, key, parameter.default)
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and value != parameter.default:
                options.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
        return (self.name or type(self).__name__) + (":" + ",".join(options) if options else "")


def check_number(name: str, value: Any, *, positive: bool) -> float:
    """A finite number above zero (or not below it), or an error that says so."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number: got {value!r}.")
    if value < 0 or (positive and value == 0):
        raise ValueError(
            f"{name} must be {'above' if positive else 'at least'} 0: got {value!r}."
            + (" To switch balancing off, use the strategy none." if name == "rate" else "")
        )
    return float(value)


def check_whole(name: str, value: Any, *, least: int) -> int:
    """A whole number, or an error that says so. Strategy strings bring it as a float."""
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or value != math.floor(value):
        raise ValueError(f"{name} must be a whole number: got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}: got {value!r}.")
    return int(value)


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false: got {value!r}.")
    return value


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
