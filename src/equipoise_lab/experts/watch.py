"""What the routers of a model choose, counted while it runs: by domain, by token, together.

Everything is a sum over tokens, so memory depends on layers, experts, domains and the tokens of the vocabulary that are
told apart, never on how much text there is. Padding is left out. A forward is counted when it ends, as a whole or not
at all. Nothing of the model is changed but for hooks, which go again.
"""

import inspect
import math
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.find import FoundRouter, find_routers
from equipoise.routing import score

__all__ = ["LayerCounts", "Watched", "choose_vocabulary", "watching"]

MOST_CELLS = 2**24  # layers * experts * token ids that are told apart
LOOKED_AT = 8192  # tokens of each domain by which these token ids are chosen


@dataclass(frozen=True)
class LayerCounts:
    """The sums of one router. Scores are the gate's, before any bias, divided by a token's sum.

    ``score_sum`` is the sum over tokens of

        sum_{e chosen} s_e / sum_j s_j,     s the router's scores without any bias, before the chosen are renormalised

    Of one token that is k/E where all scores are equal and 1 where all the score is on the chosen: divide by the tokens
    for the mean. With a bias it may be below k/E. Source: Qiu et al. 2025, arXiv:2501.11873, Fig. 4a.
    """

    name: str
    num_experts: int
    k: int
    load: Int[Tensor, "domains experts"]  # assignments
    score_sum: Float[Tensor, " domains"]  # sums over tokens of the normalised scores of the chosen
    entropy: Float[Tensor, " domains"]  # sums over tokens of H(normalised scores) / log E
    together: Int[Tensor, "experts experts"]  # tokens that chose both
    by_token: Int[Tensor, "vocabulary experts"]  # assignments by token id, of those told apart


class _Chosen(NamedTuple):
    """What one router did in the forward under way."""

    expert_ids: Int[Tensor, "tokens k"]
    score_sum: float
    entropy: float


@dataclass
class _Forward:
    """The forward under way."""

    input_ids: Int[Tensor, " tokens"]
    counted: Int[Tensor, " tokens"]  # 1 for a token, 0 for padding
    layers: dict[str, _Chosen] = field(default_factory=dict)


@dataclass
class Watched:
    """What was counted so far. ``domain`` is the number of the domain that the next forwards are of; forwards under
    None are not counted."""

    domains: tuple[str, ...]
    vocabulary: Int[Tensor, " vocabulary"]  # token ids that are told apart, ascending
    layers: list[LayerCounts]
    num_tokens: Int[Tensor, " domains"]
    occurrences: Int[Tensor, " vocabulary"]
    domain: int | None = 0

    def sums(self) -> list[Tensor]:
        """All that is summed over tokens: whoever shares the text with other processes adds theirs up, in place."""
        found = [self.num_tokens, self.occurrences]
        for layer in self.layers:
            found += [layer.load, layer.score_sum, layer.entropy, layer.together, layer.by_token]
        return found


def _new(routers: Sequence[FoundRouter], domains: Sequence[str], vocabulary: Sequence[int]) -> Watched:
    layers = [
        LayerCounts(
            name=router.name,
            num_experts=router.num_experts,
            k=router.k,
            load=torch.zeros(len(domains), router.num_experts, dtype=torch.int64),
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
    the token ids that are told apart. A router that is called otherwise than once a forward with all tokens, or never,
    is an error that names it. Raises ``EquipoiseError`` for a model without a router that is known.
    """
    routers = find_routers(model)
    watched = _new(routers, domains, vocabulary)
    names = list(inspect.signature(model.forward).parameters)
    forward: _Forward | None = None

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal forward
        forward = None
        if watched.domain is None:
            return
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise EquipoiseError("a forward that is watched must be given input_ids: it was not.")
        counted = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :] != 0
        forward = _Forward(ids.reshape(-1).cpu(), counted.reshape(-1).long().cpu())

    def watch(layer: LayerCounts, router: FoundRouter) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if forward is None:
                return
            logits, _, expert_ids = router.kind.read(output, router.k)
            again = layer.name in forward.layers
            if again or len(expert_ids) != len(forward.counted):
                raise EquipoiseError(
                    f"a router must be called once a forward, with all of its tokens: {layer.name} was called "
                    + ("twice." if again else f"with {len(expert_ids)} of {len(forward.counted)}.")
                )
            forward.layers[layer.name] = _sums(logits.detach(), expert_ids, router.kind.score_function, forward.counted)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal forward
        if forward is None:
            return
        ended, forward = forward, None
        for layer in watched.layers if watched.num_tokens.any() else ():
            if (layer.name in ended.layers) != bool(layer.load.any()):  # one that never is has no use for text
                raise EquipoiseError(
                    f"a router must be called once a forward, with all of its tokens: {layer.name} was not called in "
                    "all of them."
                )
        with _whole(), torch.autocast("cpu", enabled=False):  # in bfloat16 counts would be rounded
            _count(watched, ended)

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        for layer, router in zip(watched.layers, routers, strict=True):
            handles.append(router.module.register_forward_hook(watch(layer, router)))
        handles.append(model.register_forward_hook(after))
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _sums(
    logits: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens k"], score_function: str, counted: Tensor
) -> _Chosen:
    scores = score(logits, score_function)
    tiny = torch.finfo(scores.dtype).tiny
    p = scores / scores.sum(-1, keepdim=True).clamp_min(tiny)
    of_chosen, entropy = p.gather(-1, expert_ids).sum(-1), -(p * p.clamp_min(tiny).log()).sum(-1)
    both = torch.stack([of_chosen, entropy]).double().cpu() @ counted.double()
    return _Chosen(expert_ids.cpu(), float(both[0]), float(both[1]) / math.log(max(logits.shape[-1], 2)))


def _count(watched: Watched, forward: _Forward) -> None:
    domain, vocabulary, counted = watched.domain, watched.vocabulary, forward.counted
    watched.num_tokens[domain] += counted.sum()
    places = there = torch.zeros_like(counted)
    if len(vocabulary):
        places = torch.searchsorted(vocabulary, forward.input_ids).clamp(max=len(vocabulary) - 1)
        there = (vocabulary[places] == forward.input_ids).long() * counted  # 1 where it is told apart and counts
        watched.occurrences.scatter_add_(0, places, there)
    for layer in watched.layers:
        if layer.name not in forward.layers:
            continue
        expert_ids, score_sum, entropy = forward.layers[layer.name]
        layer.score_sum[domain] += score_sum
        layer.entropy[domain] += entropy
        one = counted[:, None].expand_as(expert_ids)
        chosen = torch.zeros(len(counted), layer.num_experts).scatter_(1, expert_ids, one.float())
        together = (chosen.T @ chosen).round().long()  # exact below 2^24 tokens a forward
        layer.together.add_(together)
        layer.load[domain] += together.diagonal()
        if len(vocabulary):
            cells = places[:, None] * layer.num_experts + expert_ids
            layer.by_token.view(-1).scatter_add_(0, cells.reshape(-1), there[:, None].expand_as(cells).reshape(-1))


@contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until what is inside is done: it takes milliseconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[tuple[int, Any]] = []
    handlers = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in replaced:
        signal.signal(number, lambda number, frame: told.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
    if told:
        replaced[told[0][0]](*told[0])


def choose_vocabulary(
    model: nn.Module, domains: Iterable[Iterable[Int[np.ndarray, " length"]]]
) -> tuple[list[int], list[str]]:
    """The token ids that are told apart, and what to note of it: all that the model knows, where they fit; else the
    most frequent ones at the beginning of each domain (its rows of token ids), as many as fit."""
    most = max(1, MOST_CELLS // sum(router.num_experts for router in find_routers(model)))
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    num = getattr(embedding, "num_embeddings", None)
    if num is not None and num <= most:
        return list(range(num)), []
    seen: Counter[int] = Counter()
    for rows in domains:
        looked_at = 0
        for row in rows:
            seen.update(row.tolist())
            looked_at += len(row)
            if looked_at >= LOOKED_AT:
                break
    chosen = [token_id for token_id, _ in seen.most_common(most)]
    left_out = len(seen) - len(chosen)
    return chosen, [f"{left_out} rare tokens are not told apart, to bound the memory"] if left_out else []
