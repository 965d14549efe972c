"""Counts what a model's routers choose while it runs: by domain, by token, and which experts together.

Every figure is a sum over tokens. Memory depends on the numbers of layers, experts, domains and vocabulary entries, not
on the amount of text. Padding is not counted. A forward is counted when it ends, completely or not at all. The model is
not changed except for hooks, which are removed again.
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
from equipoise.routers.find import find_routers
from equipoise.routers.kind import MoELayer, RouterKind
from equipoise.routing import ScoreFunction, score

__all__ = ["LayerCounts", "RouterCounts", "choose_vocabulary", "watching"]

MAX_CELLS = 2**24  # layers * experts * vocabulary entries
SAMPLE_TOKENS = 8192  # of each domain: the vocabulary is chosen from these


@dataclass(frozen=True)
class LayerCounts:
    """The sums of one router. Scores are the router's own, before any bias, divided by their sum over experts.

    ``score_sum`` is the sum over tokens of

        sum_{e chosen} s_e / sum_j s_j,     s the router's scores without any bias, before the chosen are renormalised

    For one token this is k/E if all scores are equal and 1 if the chosen experts have all of the score; with a bias it
    may be below k/E. Divide by the number of tokens for the mean. Source: Qiu et al. 2025, arXiv:2501.11873, Fig. 4a.
    """

    name: str
    num_experts: int
    k: int
    load: Int[Tensor, "domains experts"]  # assignments
    score_sum: Float[Tensor, " domains"]  # sums over tokens of the normalised scores of the chosen
    entropy: Float[Tensor, " domains"]  # sums over tokens of H(normalised scores) / log E
    together: Int[Tensor, "experts experts"]  # tokens that chose both
    by_token: Int[Tensor, "vocabulary experts"]  # assignments by token id


class _RouterOutput(NamedTuple):
    """One router in the current forward."""

    expert_ids: Int[Tensor, "tokens k"]
    score_sum: float
    entropy: float


@dataclass
class _Forward:
    """The current forward."""

    input_ids: Int[Tensor, " tokens"]
    mask: Int[Tensor, " tokens"]  # 1 for a token, 0 for padding
    outputs: dict[str, _RouterOutput] = field(default_factory=dict)


@dataclass
class RouterCounts:
    """The counts so far. ``domain`` is the index of the domain to which the next forwards belong. Forwards are not
    counted while it is None."""

    domains: tuple[str, ...]
    vocabulary: Int[Tensor, " vocabulary"]  # the token ids that ``by_token`` counts, ascending
    layers: list[LayerCounts]
    num_tokens: Int[Tensor, " domains"]
    occurrences: Int[Tensor, " vocabulary"]
    domain: int | None = 0

    def sums(self) -> list[Tensor]:
        """All sums over tokens. Processes that share the text add each other's in place."""
        tensors = [self.num_tokens, self.occurrences]
        for layer in self.layers:
            tensors += [layer.load, layer.score_sum, layer.entropy, layer.together, layer.by_token]
        return tensors


def _zero_counts(moe_layers: Sequence[MoELayer], domains: Sequence[str], vocabulary: Sequence[int]) -> RouterCounts:
    layers = [
        LayerCounts(
            name=moe_layer.name,
            num_experts=moe_layer.num_experts,
            k=moe_layer.k,
            load=torch.zeros(len(domains), moe_layer.num_experts, dtype=torch.int64),
            score_sum=torch.zeros(len(domains), dtype=torch.float64),
            entropy=torch.zeros(len(domains), dtype=torch.float64),
            together=torch.zeros(moe_layer.num_experts, moe_layer.num_experts, dtype=torch.int64),
            by_token=torch.zeros(len(vocabulary), moe_layer.num_experts, dtype=torch.int64),
        )
        for moe_layer in moe_layers
    ]
    ids = torch.tensor(sorted(set(vocabulary)), dtype=torch.int64)
    if len(ids) != len(vocabulary):
        raise ValueError(
            f"vocabulary must hold different token ids: got {len(vocabulary)}, of which {len(ids)} are different."
        )
    num_tokens = torch.zeros(len(domains), dtype=torch.int64)
    return RouterCounts(tuple(domains), ids, layers, num_tokens, torch.zeros(len(ids), dtype=torch.int64))


@contextmanager
def watching(model: nn.Module, domains: Sequence[str], vocabulary: Sequence[int] = ()) -> Iterator[RouterCounts]:
    """Counts every forward of ``model`` inside the block. Set ``domain`` of the yielded counts before each forward.

    The forward must get ``input_ids`` by name or as its first argument, and may get a 2-D ``attention_mask``.
    ``vocabulary`` lists the token ids that ``by_token`` counts. Each router must be called once per forward with all
    tokens, or in no forward at all: a router of images is not called on text.

    Raises ``EquipoiseError`` for a router that is called otherwise, and for a model without a known router.
    """
    moe_layers = find_routers(model)
    counts = _zero_counts(moe_layers, domains, vocabulary)
    names = list(inspect.signature(model.forward).parameters)
    forward: _Forward | None = None

    def begin_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal forward
        forward = None
        if counts.domain is None:
            return
        arguments = dict(zip(names, args, strict=False)) | kwargs
        ids, attention_mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise EquipoiseError("a watched forward must get input_ids: it got none. Pass token ids, not embeddings.")
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask[:, -ids.shape[1] :] != 0
        forward = _Forward(ids.reshape(-1).cpu(), mask.reshape(-1).long().cpu())

    def make_router_hook(layer: LayerCounts, kind: RouterKind) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if forward is None:
                return
            logits, _, expert_ids = kind.read(output, layer.k)
            is_second_call = layer.name in forward.outputs
            if is_second_call or len(expert_ids) != len(forward.mask):
                raise EquipoiseError(
                    f"a router must be called once per forward, with all of its tokens: {layer.name} was called "
                    + ("twice." if is_second_call else f"with {len(expert_ids)} of {len(forward.mask)} tokens.")
                )
            forward.outputs[layer.name] = _sum_scores(logits.detach(), expert_ids, kind.score_function, forward.mask)

        return hook

    def end_forward(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal forward
        if forward is None:
            return
        ended, forward = forward, None
        for layer in counts.layers if counts.num_tokens.any() else ():
            if (layer.name in ended.outputs) != bool(layer.load.any()):
                raise EquipoiseError(
                    f"a router must be called once per forward, with all of its tokens: {layer.name} was called in "
                    "some forwards and not in others."
                )
        with _signals_delayed(), torch.autocast("cpu", enabled=False):  # counts in bfloat16 would be rounded
            _count(counts, ended)

    handles = [model.register_forward_pre_hook(begin_forward, with_kwargs=True)]
    try:
        for layer, moe_layer in zip(counts.layers, moe_layers, strict=True):
            handles.append(moe_layer.router.register_forward_hook(make_router_hook(layer, moe_layer.kind)))
        handles.append(model.register_forward_hook(end_forward))
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _sum_scores(
    logits: Float[Tensor, "tokens experts"],
    expert_ids: Int[Tensor, "tokens k"],
    score_function: ScoreFunction,
    mask: Int[Tensor, " tokens"],
) -> _RouterOutput:
    scores = score(logits, score_function)
    tiny = torch.finfo(scores.dtype).tiny
    p = scores / scores.sum(-1, keepdim=True).clamp_min(tiny)
    chosen, entropy = p.gather(-1, expert_ids).sum(-1), -(p * p.clamp_min(tiny).log()).sum(-1)
    sums = torch.stack([chosen, entropy]).double().cpu() @ mask.double()
    return _RouterOutput(expert_ids.cpu(), float(sums[0]), float(sums[1]) / math.log(max(logits.shape[-1], 2)))


def _count(counts: RouterCounts, forward: _Forward) -> None:
    domain, vocabulary, mask = counts.domain, counts.vocabulary, forward.mask
    counts.num_tokens[domain] += mask.sum()
    rows = in_vocabulary = torch.zeros_like(mask)
    if len(vocabulary):
        rows = torch.searchsorted(vocabulary, forward.input_ids).clamp(max=len(vocabulary) - 1)
        in_vocabulary = (vocabulary[rows] == forward.input_ids).long() * mask
        counts.occurrences.scatter_add_(0, rows, in_vocabulary)
    for layer in counts.layers:
        if layer.name not in forward.outputs:
            continue
        expert_ids, score_sum, entropy = forward.outputs[layer.name]
        layer.score_sum[domain] += score_sum
        layer.entropy[domain] += entropy
        ones = mask[:, None].expand_as(expert_ids)
        chosen = torch.zeros(len(mask), layer.num_experts).scatter_(1, expert_ids, ones.float())
        together = (chosen.T @ chosen).round().long()  # exact below 2^24 tokens a forward
        layer.together.add_(together)
        layer.load[domain] += together.diagonal()
        if len(vocabulary):
            cells = rows[:, None] * layer.num_experts + expert_ids
            ones = in_vocabulary[:, None].expand_as(cells)
            layer.by_token.view(-1).scatter_add_(0, cells.reshape(-1), ones.reshape(-1))


@contextmanager
def _signals_delayed() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block ends, some milliseconds later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, Any]] = []
    handlers = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in replaced:
        signal.signal(number, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
    if received:
        replaced[received[0][0]](*received[0])


def choose_vocabulary(
    model: nn.Module, domains: Iterable[Iterable[Int[np.ndarray, " length"]]]
) -> tuple[list[int], list[str]]:
    """The token ids to count, and notes about them: all that the model knows if they fit into ``MAX_CELLS``, else the
    most frequent ones at the beginning of each domain. A domain is an iterable of rows of token ids."""
    max_ids = max(1, MAX_CELLS // sum(layer.num_experts for layer in find_routers(model)))
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    num_embeddings = getattr(embedding, "num_embeddings", None)
    if num_embeddings is not None and num_embeddings <= max_ids:
        return list(range(num_embeddings)), []
    frequencies: Counter[int] = Counter()
    for rows in domains:
        num_tokens = 0
        for row in rows:
            frequencies.update(row.tolist())
            num_tokens += len(row)
            if num_tokens >= SAMPLE_TOKENS:
                break
    chosen = [token_id for token_id, _ in frequencies.most_common(max_ids)]
    num_left_out = len(frequencies) - len(chosen)
    return chosen, [f"{num_left_out} rare tokens are not counted by token, to bound the memory"] if num_left_out else []
