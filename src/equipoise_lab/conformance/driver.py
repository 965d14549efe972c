"""What a framework is asked, and how it answers: a ``Driver`` is one training of its MoE layers.

A driver uses a framework as its documentation says. It is at most 100 lines long. Its ``INTENDED_USE`` names the places
of the framework's documentation or source that make each call the intended one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Batch", "Driver", "Layer", "NotOffered", "NotTried", "Refuses", "StepResult"]

Mode = Literal["train", "evaluate", "evaluate_with_gradients", "train_without_gradients"]
Recompute = Literal["own", "reentrant", "non_reentrant"]


class NotOffered(Exception):
    """The framework does not have what the scenario asks for. The message completes "does not have"."""


class Refuses(Exception):
    """The framework says that it will not do this. The message is its own words."""


class NotTried(Exception):
    """The driver cannot ask the framework. The message says why: "needs a GPU"."""


@dataclass(frozen=True)
class Layer:
    """The MoE layers that a scenario asks for.

    Each has a router whose gate is the identity ``[experts, experts]``. So the hidden state of a token is its logits.

    Attributes:
        experts, k: experts to choose from, and experts of a token.
        score_function: what makes scores of logits.
        normalises_weights: whether the weights of the chosen experts are divided by their sum.
        groups: (number of expert groups, groups open to a token).
        capacity: places of an expert, as a factor on tokens * k / experts. Tokens beyond are dropped.
        pads_to_capacity: whether experts with fewer tokens are filled up.
        loss: the load-balancing loss: over which tokens f is counted.
        bias_rate: the step of the sign rule, at each optimizer step; None without an expert bias.
        bias: the expert bias at the beginning, for every layer.
        number: how many MoE layers.
        has_prediction_head: the last of the layers stands in a multi-token-prediction head.
        rank_without: a pipeline stage, by its rank, that has no MoE layer; the other stage has them.
        dtype: the type to which the whole model is cast after it is built, as a user casts it.
        sets_coefficient_only: the user sets the loss's coefficient in the configuration, and no other switch.
        is_wrapped_in_ddp: the model is in torch's DistributedDataParallel, with its defaults.
        holds_all_experts: on several ranks, each holds all experts, as by default; else the framework may spread them.
        counts_first_choice: f of the loss counts the first choice of a token only, as GShard defines it. No scenario
            asks for that: a driver whose framework defines the loss so says it in ``as_defined``.
    """

    experts: int = 8
    k: int = 2
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalises_weights: bool = True
    groups: tuple[int, int] | None = None
    capacity: float | None = None
    pads_to_capacity: bool = False
    loss: Literal["micro_batch", "sequence", "global_batch"] | None = None
    bias_rate: float | None = None
    bias: tuple[float, ...] | None = None
    number: int = 1
    has_prediction_head: bool = False
    rank_without: int | None = None
    dtype: torch.dtype = torch.float32
    sets_coefficient_only: bool = False
    is_wrapped_in_ddp: bool = False
    holds_all_experts: bool = False
    counts_first_choice: bool = False


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        logits: ``[layers, rows, length, experts]`` float32: the hidden states that each layer's router gets.
        mask: ``[rows, length]`` bool, False for padding. None: there is no padding, and no mask is passed.
        labels: ``[rows, length]`` bool, False for tokens of a prompt, which are not labels of the loss. None: all are.
        sequence_ids: ``[rows, length]``: the number of a packed sequence. None: a row is a sequence.
        mode: what the micro-batch is for. Only ``train`` has a backward.
        replayed: ``[layers, rows, length, k]`` expert ids of a rollout, which are to be used. None: routed live.
    """

    logits: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    sequence_ids: Tensor | None = None
    mode: Mode = "train"
    replayed: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return self.logits[0, ..., 0].numel() if self.mask is None else int(self.mask.sum())

    @contextmanager
    def forward_of(self, model: nn.Module) -> Iterator[None]:
        """A forward of ``model`` in the mode of this micro-batch: train() or eval(), with gradients or without."""
        model.train(self.mode.startswith("train"))
        with torch.set_grad_enabled(self.mode in ("train", "evaluate_with_gradients")):
            yield


@dataclass
class StepResult:
    """What one optimizer step showed. What a framework does not show stays None.

    Attributes:
        loss: the balancing loss that the framework adds or reports, summed over layers, with coefficient 1 and divided
            by the driver's ``value_at_balance``. Of the last micro-batch if it reports one for each.
        gradients: by layer, of the balancing loss alone at the gate ``[experts, experts]``, after the reduction over
            ranks, as the optimizer sees it.
        counts: by layer, what the framework counted in this step before it moved the bias, over all ranks.
        imbalance: the framework's metric of load imbalance, of the first layer.
    """

    loss: float | None = None
    gradients: list[Tensor] | None = None
    counts: list[Tensor] | None = None
    imbalance: float | None = None


class Driver(ABC):
    """One training of one framework's MoE layers. The defaults raise ``NotOffered``."""

    PACKAGE: ClassVar[str]
    """Its distribution on PyPI."""
    INTENDED_USE: ClassVar[Mapping[str, str]]
    """By call, the place of its documentation or source that makes this the intended use."""
    value_at_balance: float = 1.0
    """The framework's loss at perfect balance, with coefficient 1: a convention, by which values are divided."""
    imbalance_of: Callable[[list[int]], float] | None = None
    """The formula of its metric of load imbalance, on counts: also a convention."""

    @classmethod
    def as_defined(cls, layer: Layer) -> Layer:
        """The layer whose loss is the right one, where a framework documents another definition of f."""
        return layer

    @abstractmethod
    def __init__(self, layer: Layer) -> None:
        """Builds the layers, on every rank of the process group if there is one.

        Raises:
            NotOffered: the framework has no such layer.
            Refuses: the framework refuses to build it.
        """

    @abstractmethod
    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        recompute: Recompute | None = None,
        is_applied: bool = True,
        has_finite_gradients: bool = True,
    ) -> StepResult:
        """One optimizer step of the framework on this rank's micro-batches, in their order.

        The learning rate is 0: weights do not move. The task's loss adds nothing to the gradients.

        Args:
            batches: of this rank. Those with another mode than ``train`` are forwards in between.
            recompute: the way of activation checkpointing: the framework's own, or torch's two.
            is_applied: False if the training loop skips this optimizer step (a spike, a bad batch).
            has_finite_gradients: False if a gradient of the model is infinite in this step.
        """

    def biases(self) -> list[Tensor]:
        """By layer, the expert bias that the router adds for its choice, float32."""
        raise NotOffered("an expert bias")

    def choose(self, batch: Batch) -> Tensor:
        """The experts ``[tokens, k]`` that the first layer chooses in evaluation, in the order of the tokens."""
        raise NotOffered("a way to see the chosen experts")

    def evaluation_loss(self, batch: Batch) -> float:
        """The balancing loss inside the evaluation loss that the framework reports, coefficient 1."""
        raise NotOffered("an evaluation loss")

    def default_bias_rate(self) -> float:
        """The rate of its default configuration for a model that was trained without a bias (Qwen3 MoE)."""
        raise NotOffered("a default configuration for Qwen3 MoE")

    def cast(self, dtype: torch.dtype) -> None:
        """Casts the model, as a user of the framework casts it; by default ``self.model.to(dtype)``."""
        model = getattr(self, "model", None)
        if model is None:
            raise NotOffered("a model that can be cast")
        model.to(dtype)

    def save(self) -> Any:
        """What the framework saves of the model, as in its checkpoint."""
        raise NotOffered("a checkpoint of the layer")

    def load(self, state: Any) -> None:
        """Loads what ``save`` gave, into this newly built training."""
        raise NotOffered("a checkpoint of the layer")

    @staticmethod
    def sum_over_ranks(number: float, group: Any = None) -> float:
        """The sum of a number over the ranks of a group, by default all; the number itself without a process group."""
        total = torch.tensor(number, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(total, group=group)
        return float(total)

    @staticmethod
    def mean_over_ranks(gradients: Sequence[Tensor | None], group: Any = None) -> list[Tensor]:
        """What torch's DistributedDataParallel does with gradients."""
        means = [gradient.clone() for gradient in gradients if gradient is not None]
        if dist.is_initialized():
            for mean in means:
                dist.all_reduce(mean, group=group)
                mean /= dist.get_world_size(group)
        return means
