"""What the routers of a model choose, counted while it runs: by domain, by token, together.

Everything is a sum over tokens, so memory depends on layers, experts, domains and the tokens of the vocabulary that are
told apart, never on how much text there is. Padding is left out. Nothing of the model is changed but for hooks, which
go again.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routing import score
from equipoise.taps.families import FoundRouter, find_routers

__all__ = ["LayerCounts", "Watched", "watching"]


@dataclass(frozen=True)
class LayerCounts:
    """The sums of one router. Scores are the gate's, before any offset, divided by a token's sum."""

    name: str
    num_experts: int
    k: int
    load: Int[Tensor, "domains experts"]  # assignments
    mean_score: Float[Tensor, "domains experts"]  # sums over tokens of normalised scores
    score_sum: Float[Tensor, " domains"]  # sums over tokens of the normalised scores of the chosen
    entropy: Float[Tensor, " domains"]  # sums over tokens of H(normalised scores) / log E
    together: Int[Tensor, "experts experts"]  # tokens that chose both
    by_token: Int[Tensor, "vocabulary experts"]  # assignments by token id, of those told apart


@dataclass
class Watched:
    """What was counted so far. ``domain`` is the number of the domain that the next forwards are of."""

    domains: tuple[str, ...]
    vocabulary: Int[Tensor, " vocabulary"]  # token ids that are told apart, ascending
    layers: list[LayerCounts]
    num_tokens: Int[Tensor, " domains"]
    occurrences: Int[Tensor, " vocabulary"]
    domain: int = 0
    _input_ids: Int[Tensor, " tokens"] | None = field(default=None, repr=False)
    _counted: Int[Tensor, " tokens"] | None = field(default=None, repr=False)  # 1 for a token, 0 for padding


def _new(routers: Sequence[FoundRouter], domains: Sequence[str], vocabulary: Sequence[int]) -> Watched:
    layers = [
        LayerCounts(
            name=router.name,
            num_experts=router.num_experts,
            k=router.k,
            load=torch.zeros(len(domains), router.num_experts, dtype=torch.int64),
            mean_score=torch.zeros(len(domains), router.num_experts, dtype=torch.float64),
            score_sum=torch.zeros(len(domains), dtype=torch.float64),
            entropy=torch.zeros(len(domains), dtype=torch.float64),
            together=torch.zeros(router.num_experts, router.num_experts, dtype=torch.int64),
            by_token=torch.zeros(len(vocabulary), router.num_experts, dtype=torch.int64),
        )
        for router in routers
    ]
    ids = torch.tensor(sorted(set(vocabulary)), dtype=torch.int64)
    if len(ids) != len(vocabulary):
        raise ValueError(f"vocabulary must name token ids once: got {len(vocabulary)}, {len(ids)} of them different.")
    num = torch.zeros(len(domains), dtype=torch.int64)
    return Watched(tuple(domains), ids, layers, num, torch.zeros(len(ids), dtype=torch.int64))


@contextmanager
def watching(model: nn.Module, domains: Sequence[str], vocabulary: Sequence[int] = ()) -> Iterator[Watched]:
    """Counts every forward of ``model`` while it is open; set ``domain`` of what it yields before each.

    The forward must get ``input_ids`` by that name, or first, and may get a 2-D ``attention_mask``. ``vocabulary`` are
    the token ids that are told apart. A router that is called otherwise than once a forward with all tokens is an error
    that names it. Raises ``EquipoiseError`` for a model without a router that is known.
    """
    routers = find_routers(model)
    watched = _new(routers, domains, vocabulary)
    names = list(inspect.signature(model.forward).parameters)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise EquipoiseError("a forward that is watched must be given input_ids: it was not.")
        watched._input_ids = ids.reshape(-1).cpu()
        counted = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :] != 0
        watched._counted = counted.reshape(-1).long().cpu()
        watched.num_tokens[watched.domain] += watched._counted.sum()
        _add_occurrences(watched)

    def watch(layer: LayerCounts, router: FoundRouter) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if watched._counted is None:
                return
            logits, _, expert_ids = router.kind.read(output, router.k)
            if len(expert_ids) != len(watched._counted):
                raise EquipoiseError(
                    f"a router must be called with all tokens of a forward: {layer.name} was called with "
                    f"{len(expert_ids)} of {len(watched._counted)}."
                )
            _count(watched, layer, logits.detach(), expert_ids.cpu(), router.kind.gate)

        return hook

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        for layer, router in zip(watched.layers, routers, strict=True):
            handles.append(router.module.register_forward_hook(watch(layer, router)))
        yield watched
    finally:
        for handle in handles:
            handle.remove()
        watched._input_ids = watched._counted = None


def _places(watched: Watched) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """By token its place in the vocabulary, and 1 where it is in there and counts."""
    assert watched._input_ids is not None and watched._counted is not None
    if not len(watched.vocabulary):
        return torch.zeros_like(watched._input_ids), torch.zeros_like(watched._input_ids)
    places = torch.searchsorted(watched.vocabulary, watched._input_ids).clamp(max=len(watched.vocabulary) - 1)
    return places, (watched.vocabulary[places] == watched._input_ids).long() * watched._counted


def _add_occurrences(watched: Watched) -> None:
    places, there = _places(watched)
    if len(watched.vocabulary):
        watched.occurrences.scatter_add_(0, places, there)


def _count(
    watched: Watched, layer: LayerCounts, logits: Tensor, expert_ids: Int[Tensor, "tokens k"], gate: str
) -> None:
    counted = watched._counted
    assert counted is not None
    one = counted[:, None].expand_as(expert_ids)
    layer.load[watched.domain].scatter_add_(0, expert_ids.reshape(-1), one.reshape(-1))
    scores = score(logits, gate).double().cpu()
    p = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    weight = counted.double()
    layer.mean_score[watched.domain] += weight @ p
    layer.score_sum[watched.domain] += (p.gather(-1, expert_ids).sum(-1) * weight).sum()
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1) / math.log(max(layer.num_experts, 2))
    layer.entropy[watched.domain] += (entropy * weight).sum()
    chosen = torch.zeros(len(expert_ids), layer.num_experts).scatter_(1, expert_ids, one.float())
    layer.together.add_((chosen.T @ chosen).round().long())  # exact below 2^24 tokens a forward
    if len(watched.vocabulary):
        places, there = _places(watched)
        cells = places[:, None] * layer.num_experts + expert_ids
        layer.by_token.view(-1).scatter_add_(0, cells.reshape(-1), there[:, None].expand_as(cells).reshape(-1))
