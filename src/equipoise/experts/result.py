"""Watched -> what is said of a model: plain numbers and words, as JSON can hold them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from equipoise.analysis import (
    coactivation_of,
    domain_information,
    mean_domain_distance,
    typical_tokens,
)
from equipoise.experts.watch import LayerCounts, Watched
from equipoise.metrics import dead_experts, effective_experts, max_violation, sampling_floor
from equipoise.records import finite

__all__ = ["RESULT", "Audited", "summarise", "verdict"]

RESULT = "audit.json"
FORMAT = 1
RANKS = (2, 4, 8, 16, 32, 64)  # of expert parallelism
STARVED = 0.1  # of the mean load: an expert below is starved
COLLAPSED = 0.5  # of the experts or fewer, as ``effective_experts`` counts them
FEW_TOKENS = 2000  # what is said of a domain of fewer is uncertain


@dataclass(frozen=True)
class Audited:
    """What was counted, and what to know of it."""

    watched: Watched
    nats: dict[str, float]  # mean cross-entropy of the next token, by domain
    notes: tuple[str, ...]
    complete: bool = True  # whether the text was run to its end


def rank_load(load: Int[np.ndarray, " experts"], ranks: int) -> float | None:
    """The busiest rank's load over the mean, experts dealt in their order to ``ranks`` of expert parallelism.

    1 is even; None where they do not divide.

    >>> rank_load(np.array([3, 1, 2, 2]), 2), rank_load(np.array([3, 3, 1, 1]), 2), rank_load(np.array([1, 1]), 4)
    (1.0, 1.5, None)
    """
    if len(load) % ranks:
        return None
    by_rank = load.reshape(ranks, -1).sum(1)
    return float(by_rank.max() / by_rank.mean())


def summarise(audited: Audited, decode: Callable[[int], str]) -> dict[str, Any]:
    """Everything that an audit says, domains without a token left out and named. ``decode`` gives the text of a token
    id."""
    watched = audited.watched
    kept = np.flatnonzero(watched.num_tokens.numpy() > 0)
    tokens = watched.num_tokens.numpy()[kept]
    domains = [watched.domains[index] for index in kept]
    few = [name for name, num in zip(domains, tokens, strict=True) if num < FEW_TOKENS]
    uncertain = f"fewer than {FEW_TOKENS} tokens of {', '.join(few)}: what is said of such a domain is uncertain"
    vocabulary, occurrences = watched.vocabulary.numpy(), watched.occurrences.numpy()
    called = [layer for layer in watched.layers if layer.load.any()]
    idle = [f"{layer.name} was given no token: it is left out" for layer in watched.layers if not layer.load.any()]
    layers = [_layer(layer, kept, tokens, vocabulary, occurrences, decode) for layer in called]
    names = ("maxvio", "maxvio_floor", "topk_score_sum", "router_entropy")
    return finite(
        {
            "format": FORMAT,
            "complete": audited.complete,
            "domains": domains,
            "few_tokens": few,
            "left_out": [name for name in watched.domains if name not in domains],
            "tokens": dict(zip(domains, tokens.tolist(), strict=True)),
            "nats": audited.nats,
            "notes": [*audited.notes, *idle, *([uncertain] if few else [])],
            "layers": layers,
            "mean": {name: float(np.mean([layer[name] for layer in layers])) for name in names}
            | {
                name: float(np.mean([layer[name]["value"] for layer in layers]))
                for name in ("domain_information_bits", "domain_distance")
            },
            "words": [words for layer in layers if (words := verdict(layer))],
        }
    )


def _layer(
    layer: LayerCounts,
    kept: Int[np.ndarray, " domains"],
    tokens: Int[np.ndarray, " domains"],
    vocabulary: Int[np.ndarray, " vocabulary"],
    occurrences: Int[np.ndarray, " vocabulary"],
    decode: Callable[[int], str],
) -> dict[str, Any]:
    by_domain = layer.load.numpy()[kept]
    load = by_domain.sum(0)
    information, share = domain_information(by_domain)
    distance = mean_domain_distance(by_domain)
    together = coactivation_of(layer.together.numpy())
    typical = typical_tokens(layer.by_token.numpy(), occurrences) if len(vocabulary) else []
    scores: Float[np.ndarray, " domains"] = layer.score_sum.numpy()[kept] / tokens
    return {
        "layer": layer.name,
        "experts": layer.num_experts,
        "k": layer.k,
        "load": load.tolist(),
        "load_by_domain": by_domain.tolist(),
        "maxvio": float(max_violation(layer.load[kept].sum(0))),
        "maxvio_floor": sampling_floor(int(tokens.sum()), layer.k, layer.num_experts),
        "maxvio_by_domain": max_violation(layer.load[kept]).tolist(),
        "dead_experts": int(dead_experts(layer.load[kept].sum(0))),
        "starved_experts": int(((load > 0) & (load < STARVED * load.mean())).sum()),
        "effective_experts": float(effective_experts(layer.load[kept].sum(0))),
        "domain_information_bits": {"value": information.value, "bound": information.bound, "share": share},
        "domain_distance": {"value": distance.value, "bound": distance.bound},
        "topk_score_sum": float((scores * tokens).sum() / tokens.sum()),
        "topk_score_sum_by_domain": scores.tolist(),
        "router_entropy": float(layer.entropy.numpy()[kept].sum() / tokens.sum()),
        "coactivation": together.round(4).tolist(),
        "rank_load": {str(ranks): found for ranks in RANKS if (found := rank_load(load, ranks)) is not None},
        "typical_tokens": [
            [
                {"text": decode(int(vocabulary[token.token_id])), "share": token.share, "count": token.count}
                for token in expert
            ]
            for expert in typical
        ],
    }


def verdict(layer: dict[str, Any]) -> str | None:
    """What is wrong with a layer's balance, in words; None where nothing is."""
    experts, found = layer["experts"], []
    if layer["effective_experts"] <= COLLAPSED * experts:
        found.append(f"collapsed: as uneven as {layer['effective_experts']:.1f} experts that are used alike")
    if layer["dead_experts"]:
        found.append(f"{layer['dead_experts']} of {experts} experts got no token")
    if layer["starved_experts"]:
        found.append(f"{layer['starved_experts']} got less than a tenth of the mean")
    return f"{layer['layer']}: {', '.join(found)}" if found else None
