"""The model that is checked: its copies, its runs, and the router calls that are observed in them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from equipoise.attachment import attach
from equipoise.balance import Balance
from equipoise.balancers import Balancer
from equipoise.routers import RouterKind
from equipoise.routers.find import find_routers

Where = Callable[[str, nn.Module], bool]


class ObservedCall(NamedTuple):
    """The arguments and results of one router call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Float[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens k"]
    expert_ids: Int[Tensor, "tokens k"]
    has_graph: bool  # False within a reentrant checkpoint, for instance

    @property
    def chooses_all_experts(self) -> bool:
        return self.expert_ids.shape[-1] == self.logits.shape[-1]


@dataclass(frozen=True)
class Subject:
    """The model that is checked, and the batch that it is called with."""

    model: nn.Module
    batch: dict[str, Any]
    where: Where | None

    @property
    def flipped_batch(self) -> dict[str, Any]:
        """Another batch: the sequences in reverse."""
        flip = {name: isinstance(value, Tensor) and value.dim() >= 2 for name, value in self.batch.items()}
        return {name: value.flip(1) if flip[name] else value for name, value in self.batch.items()}

    def copy(self) -> nn.Module:
        model = deepcopy(self.model).train()
        model.zero_grad(set_to_none=True)
        return model

    def attached(self, *balancers: Balancer, biases: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, Balance]:
        """An attached copy, and its ``Balance``."""
        model = self.copy()
        return model, attach(model, *balancers, where=self.where, biases=biases)

    def routers(self, model: nn.Module) -> dict[str, tuple[nn.Module, RouterKind]]:
        return {
            layer.name: (layer.router, layer.kind)
            for layer in find_routers(model)
            if self.where is None or self.where(layer.name, layer.router)
        }

    def record(self, model: nn.Module) -> dict[str, list[ObservedCall]]:
        """By layer, a list that every router call from now on is appended to."""
        calls: dict[str, list[ObservedCall]] = {}
        for name, (router, kind) in self.routers(model).items():
            calls[name] = []

            def hook(
                module: Any,
                args: Any,
                kwargs: Any,
                output: Any,
                layer_calls: list[ObservedCall] = calls[name],
                kind: RouterKind = kind,
            ) -> None:
                logits, weights, expert_ids = kind.read(output, getattr(module, "top_k", None))
                layer_calls.append(ObservedCall(args, kwargs, logits, weights, expert_ids, torch.is_grad_enabled()))

            router.register_forward_hook(hook, with_kwargs=True)
        return calls

    def random_biases(self, spread: float) -> dict[str, Float[Tensor, " experts"]]:
        """``spread`` is in units of the standard deviation of each layer's scores."""
        model = self.copy()
        calls, biases = self.record(model), {}
        with torch.no_grad():
            run_model(model, self.batch)
        for seed, (name, (_, kind)) in enumerate(self.routers(model).items()):
            deviation = kind.ranked(calls[name][0].logits).std().float().cpu()
            noise = torch.randn(calls[name][0].logits.shape[-1], generator=torch.Generator().manual_seed(seed))
            biases[name] = spread * deviation * noise
        return biases

    def decisive_biases(self) -> dict[str, Float[Tensor, " experts"]]:
        """Biases by which one expert is always chosen."""
        return {
            name: torch.where(torch.arange(bias.numel()) == bias.numel() // 2, 100.0, 0.0)
            for name, bias in self.random_biases(0.0).items()
        }


def drain(calls: dict[str, list[ObservedCall]]) -> dict[str, list[ObservedCall]]:
    """The recorded calls; the lists are emptied."""
    drained = {name: list(layer_calls) for name, layer_calls in calls.items()}
    for layer_calls in calls.values():
        layer_calls.clear()
    return drained


# ---- runs of a model ----


@contextmanager
def seeded() -> Iterator[None]:
    """The same dropout in every run; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def run_model(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Float[Tensor, ""]]:
    """The output, and a scalar made from it."""
    with seeded():
        output = model(**batch)
    return output, scalar_of(output)


def scalar_of(output: Any) -> Float[Tensor, ""]:
    for value in (output, getattr(output, "loss", None), getattr(output, "logits", None)):
        if isinstance(value, Tensor):
            return value if value.dim() == 0 else value.square().mean()
    raise TypeError(f"the model must return a tensor, or an object with loss or logits: got {type(output).__name__}")


def tensors_of(output: Any) -> list[Tensor]:
    return [scalar_of(output), *(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- counts ----


def count_by_hand(calls: Sequence[ObservedCall], mask: Tensor | None = None) -> Int[Tensor, " experts"]:
    """One count for each unmasked token and each expert chosen for it."""
    total = torch.zeros(calls[0].logits.shape[-1], dtype=torch.int64)
    for call in calls:
        ids = call.expert_ids if mask is None else call.expert_ids[mask.reshape(-1) != 0]
        total += torch.bincount(ids.reshape(-1).cpu(), minlength=total.numel())
    return total


def count_tokens(calls: Sequence[ObservedCall], mask: Tensor | None) -> int:
    """Unmasked tokens of one forward, all of which each call has."""
    return len(calls[0].expert_ids) if mask is None else int((mask != 0).sum())
