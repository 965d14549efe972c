"""Watched -> what is said of a model: plain numbers and words, as JSON can hold them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from equipoise.metrics import dead_experts, effective_experts, max_violation, sampling_floor
from equipoise_lab.analysis import (
    domain_information,
    information_by_level,
    mean_domain_distance,
    partners,
    rank_load,
    typical_tokens,
)
from equipoise_lab.analysis.specialisation import RANKS
from equipoise_lab.experts.watch import LayerCounts, Watched
from equipoise_lab.records import finite

__all__ = ["RESULT", "Audited", "summarise", "verdict"]

RESULT = "audit.json"
FORMAT = 1
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
    samples: Mapping[str, str] = field(default_factory=dict)  # the beginning of each domain's text


def summarise(
    audited: Audited, decode: Callable[[int], str], levels: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Everything that an audit says, domains without a token left out and named.

    ``decode`` gives the text of a token id; ``levels`` what domains have in common, see ``information_by_level``.
    """
    watched = audited.watched
    kept = np.flatnonzero(watched.num_tokens.numpy() > 0)
    tokens = watched.num_tokens.numpy()[kept]
    domains = [watched.domains[index] for index in kept]
    few = [name for name, num in zip(domains, tokens, strict=True) if num < FEW_TOKENS]
    uncertain = f"fewer than {FEW_TOKENS} tokens of {', '.join(few)}: what is said of such a domain is uncertain"
    vocabulary, occurrences = watched.vocabulary.numpy(), watched.occurrences.numpy()
    called = [layer for layer in watched.layers if layer.load.any()]
    idle = [f"{layer.name} was given no token: it is left out" for layer in watched.layers if not layer.load.any()]
    of_kept = {level: [labels[index] for index in kept.tolist()] for level, labels in (levels or {}).items()}
    of_kept = {level: labels for level, labels in of_kept.items() if 1 < len(set(labels)) < len(labels)}
    layers = [_layer(layer, kept, of_kept, tokens, vocabulary, occurrences, decode) for layer in called]
    names = ("maxvio", "maxvio_floor", "topk_score_sum", "router_entropy")
    return finite(
        {
            "format": FORMAT,
            "complete": audited.complete,
            "domains": domains,
            "few_tokens": few,
            "left_out": [name for name in watched.domains if name not in domains],
            "tokens": dict(zip(domains, tokens.tolist(), strict=True)),
            "levels": {level: dict(zip(domains, labels, strict=True)) for level, labels in of_kept.items()},
            "nats": audited.nats,
            "notes": [*audited.notes, *idle, *([uncertain] if few else [])],
            "layers": layers,
            "mean": {name: float(np.mean([layer[name] for layer in layers])) for name in names}
            | {
                name: float(np.mean([layer[name]["value"] for layer in layers]))
                for name in ("domain_information_bits", "domain_distance")
            }
            | {
                "information_by_level": {
                    level: float(np.mean([layer["information_by_level"][level]["value"] for layer in layers]))
                    for level in [*of_kept, "domain"]
                }
            },
            "words": [words for layer in layers if (words := verdict(layer))],
        }
    )


def _layer(
    layer: LayerCounts,
    kept: Int[np.ndarray, " domains"],
    levels: Mapping[str, Sequence[str]],
    tokens: Int[np.ndarray, " domains"],
    vocabulary: Int[np.ndarray, " vocabulary"],
    occurrences: Int[np.ndarray, " vocabulary"],
    decode: Callable[[int], str],
) -> dict[str, Any]:
    by_domain = layer.load.numpy()[kept]
    load = by_domain.sum(0)
    information, share = domain_information(by_domain)
    distance = mean_domain_distance(by_domain)
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
        "information_by_level": {
            level: {"value": found.value, "bound": found.bound}
            for level, found in information_by_level(by_domain, levels).items()
        },
        "domain_distance": {"value": distance.value, "bound": distance.bound},
        "topk_score_sum": float((scores * tokens).sum() / tokens.sum()),
        "topk_score_sum_by_domain": scores.tolist(),
        "router_entropy": float(layer.entropy.numpy()[kept].sum() / tokens.sum()),
        "partners": [[[other, round(share, 4)] for other, share in row] for row in partners(layer.together.numpy())],
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
        found.append(f"{layer['starved_experts']} of {experts} experts got less than a tenth of the mean load")
    return f"{layer['layer']}: {', '.join(found)}" if found else None
