"""The interface of a balancer: one mechanism, and everything it may see.

A balancer never sees the model, the optimizer or the device mesh. It is a specification until ``attach`` copies it and
calls ``prepare`` with a stack of layers. Layers with the same number of experts, the same k and the same way to select
share one copy. Its state is stacked, ``(layers, experts)``.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.routing import Routing, ScoreFunction, Selection

__all__ = [
    "Balancer",
    "LayerStack",
    "Pooling",
    "Scope",
    "check_bool",
    "check_load",
    "check_number",
    "check_whole",
]

Scope = Literal["sequence", "micro_batch", "global_batch"]
Pooling = Literal["window", "previous"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
Load = Int[Tensor, "layers experts"]


@dataclass(frozen=True)
class LayerStack:
    """The layers that share one copy of a balancer: same number of experts, same k, same way to select.

    Attributes:
        score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus``.
        k: experts per token.
        bias: the bias to start from, float32 ``[layers, experts]``; zeros where there is none.
        selection: what the bias is added to: ``scores`` or ``logits``.
        fused: whether a statistic may come from a kernel, where there is one.
    """

    score_function: ScoreFunction
    k: int
    bias: Float[Tensor, "layers experts"]  # to start from, in float32; zeros where there are none
    selection: Selection = "scores"  # what the bias is added to: the scores or the logits
    fused: bool = False  # a statistic may come from a kernel, where there is one

    def __repr__(self) -> str:
        layers, experts = self.bias.shape
        return f"LayerStack({self.score_function!r}, k={self.k}, selection={self.selection!r}, {layers=}, {experts=})"


class Balancer:
    """One mechanism. Every hook does nothing here; a subclass is final and overrides the hooks it needs.

    Its strategy string is made of the arguments of its constructor, so keep each in an attribute of the same name.

    Attributes:
        name: its name in strategy strings.
        metric: the name of its loss in the logs.
        scope: whose counts reach ``loss``: ``micro_batch`` or ``global_batch``. With ``sequence`` and ``token``: none.
        pooling: which counts ``global_batch`` takes, as for ``LoadBalancingLoss``.
        coefficient: weight of the loss.
        normalise: for ``slopes``: whether scores are divided by their sum.
        multiplies: the choice is made by ``score * (1 + bias)`` instead of ``score + bias``.
        gathers: statistics of calls and ranks are concatenated instead of summed; for small batches.
    """

    name: str = ""  # in strategy strings
    metric: str = "loss"  # the name of its loss in the logs
    scope: Scope | Literal["token"] = "global_batch"  # whose counts reach ``loss``; sequence and token: none
    pooling: Pooling = "window"  # as for ``LoadBalancingLoss``
    coefficient: float = 0.0  # weight of the loss
    normalise: bool = False  # for ``slopes``
    multiplies: bool = False  # the choice is made by ``score * (1 + bias)`` instead of ``score + bias``
    gathers: bool = False  # statistics of calls and ranks are concatenated instead of summed; for small batches

    def prepare(self, layers: LayerStack) -> None:
        """Sets up the state for these layers. ``attach`` calls it once, on a copy of the balancer.

        Args:
            layers: sizes, score function, and the bias to start from. Clone ``layers.bias``.
        """

    def bias(self) -> Float[Tensor, "layers experts"] | None:
        """Moves the choice only, never the weights. The tensor itself is the state: it is moved, saved and loaded."""
        return None

    def state(self) -> dict[str, Float[Tensor, "layers experts"]]:
        """What ``update`` moves besides the bias, by name. It starts at zero and is saved and loaded with the bias."""
        return {}

    def statistic(self, routing: Routing, row: int) -> Tensor | None:
        """What ``update`` needs from one counted router call besides its load.

        It is summed over the calls of the window and over the ranks; with ``gathers`` it is concatenated.

        Args:
            routing: what the call decided.
            row: the layer's row in the state.

        Returns:
            int64 of a fixed shape, 0 for masked tokens; with ``gathers`` a row per token of any dtype. A new tensor
            each time: it is kept, and the next ones are added to it. None: nothing is needed.
        """
        return None

    def micro_batch_statistic(self, load: Load) -> Int[Tensor, "layers numbers"] | None:
        """The same as ``statistic`` for one micro-batch on one rank.

        Args:
            load: the counts of the micro-batch on this rank.

        Returns:
            int64 ``[layers, numbers]``, always; or None, always: ``attach`` asks once.
        """
        return None

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""] | None:
        """One layer's loss, without the coefficient.

        Args:
            routing: what a router call decided.
            load: the counts of the balancer's scope, ``[experts]``; None for ``sequence`` and ``token``.

        Returns:
            A mean over the unmasked tokens of ``routing``, differentiable in its logits.
        """
        return None

    def slopes(self, load: Int[Tensor, "*scopes experts"]) -> Float[Tensor, "*scopes experts"] | None:
        """The slopes of a loss that is linear in the scores, given the counts.

            loss = mean_t sum_e slope_e p_te
            p: the scores, divided by their sum if normalise

        With slopes, ``loss`` itself is not called, and its gradient has a closed form.

        Args:
            load: the counts of one or several scopes.

        Returns:
            The slopes, in the shape of ``load``. None: autograd computes the gradient, which is slower.
        """
        return None

    def update(self, load: Load, statistic: Sequence[Tensor] | None = None, window: int = 0) -> None:
        """Moves the bias, in place, at the end of a window.

        Args:
            load: the counts of the window over all ranks.
            statistic: the pooled results of ``statistic`` or ``micro_batch_statistic``, by layer.
            window: the number of windows that ended before.
        """

    @property
    def has_bias(self) -> bool:
        """Whether the class has a ``bias``."""
        return type(self).bias is not Balancer.bias

    @property
    def has_loss(self) -> bool:
        """Whether the class has a ``loss``."""
        return type(self).loss is not Balancer.loss

    @property
    def has_slopes(self) -> bool:
        """Whether the class has ``slopes``."""
        return type(self).slopes is not Balancer.slopes

    def notes(self, num_steps: int) -> list[str]:
        """What a user should know before a run of this many steps, such as a rate that is too small for it.

        Args:
            num_steps: optimizer steps of the whole run.
        """
        return []

    def _options(self) -> Iterator[tuple[str, Any, Any]]:  # name, value, default
        for key, parameter in inspect.signature(type(self)).parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                yield key, getattr(self, key, parameter.default), parameter.default

    def __str__(self) -> str:
        """The strategy string that makes this balancer again; options at their default are left out."""
        changed = ((key, value) for key, value, default in self._options() if value != default)
        options = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changed]
        return (self.name or type(self).__name__) + (":" + ",".join(options) if options else "")

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value, _ in self._options() if value is not None)
        return f"{type(self).__name__}({options})"


def check_number(name: str, value: Any, *, positive: bool) -> float:
    """``value`` as a float. Raises ``ValueError`` unless it is finite and at least 0, or above 0 if ``positive``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number: got {value!r}.")
    if value < 0 or (positive and value == 0):
        remedy = " To switch balancing off, use the strategy none." if name == "rate" else ""
        raise ValueError(f"{name} must be {'above' if positive else 'at least'} 0: got {value!r}.{remedy}")
    return float(value)


def check_whole(name: str, value: Any, *, least: int) -> int:
    """``value`` as an int, also of 3.0. Raises ``ValueError`` unless it is whole and at least ``least``."""
    is_number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not is_number or value != math.floor(value):  # strategy strings give it as a float
        raise ValueError(f"{name} must be a whole number: got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}: got {value!r}.")
    return int(value)


def check_bool(name: str, value: Any) -> bool:
    """``value``. Raises ``ValueError`` unless it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false: got {value!r}.")
    return value


def check_load(load: Tensor, state: Tensor) -> None:
    """Raises ``ValueError`` unless ``load`` is int64 in the shape of ``state``, ``[layers, experts]``."""
    if load.shape != state.shape or load.dtype != torch.int64:
        raise ValueError(
            f"load must hold one int64 count per expert of each layer: expected shape {tuple(state.shape)}, got "
            f"{tuple(load.shape)} of {load.dtype}. Under expert parallelism pass the counts of all experts, not only "
            "those on this rank."
        )
