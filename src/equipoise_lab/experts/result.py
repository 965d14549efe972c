"""Turns the counts of an audit into plain numbers and words that JSON can hold."""

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
from equipoise_lab.experts.watch import LayerCounts, RouterCounts
from equipoise_lab.records import finite

__all__ = ["RESULT", "AuditData", "describe_imbalance", "summarise"]

RESULT = "audit.json"
FORMAT = 1
STARVED = 0.1  # of the mean load: an expert with less is starved
COLLAPSED = 0.5  # of the experts: a layer with so few effective experts, or fewer, has collapsed
FEW_TOKENS = 2000  # a domain with fewer tokens has uncertain figures


@dataclass(frozen=True)
class AuditData:
    """Everything that an audit measured, before it is summarised."""

    counts: RouterCounts
    nats: dict[str, float]  # mean cross-entropy of the next token, by domain
    notes: tuple[str, ...]
    complete: bool = True  # whether all of the text was run
    samples: Mapping[str, str] = field(default_factory=dict, repr=False)  # the beginning of each domain's text


def summarise(
    data: AuditData, decode: Callable[[int], str], levels: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """The content of audit.json. Domains without a token are left out and named.

    ``decode`` gives the text of a token id. ``levels`` says what domains have in common, see ``information_by_level``.
    """
    counts = data.counts
    indices = np.flatnonzero(counts.num_tokens.numpy() > 0)  # of the domains with tokens
    tokens = counts.num_tokens.numpy()[indices]
    domains = [counts.domains[index] for index in indices]
    few = [name for name, num in zip(domains, tokens, strict=True) if num < FEW_TOKENS]
    uncertain = f"fewer than {FEW_TOKENS} tokens of {', '.join(few)}: the figures of such a domain are uncertain"
    vocabulary, occurrences = counts.vocabulary.numpy(), counts.occurrences.numpy()
    called = [layer for layer in counts.layers if layer.load.any()]
    idle = [f"{layer.name} received no tokens: it is left out" for layer in counts.layers if not layer.load.any()]
    # a level that groups no domains, or groups all of them, tells nothing
    all_levels = {level: [labels[index] for index in indices.tolist()] for level, labels in (levels or {}).items()}
    used_levels = {level: labels for level, labels in all_levels.items() if 1 < len(set(labels)) < len(labels)}
    layers = [_layer(layer, indices, used_levels, tokens, vocabulary, occurrences, decode) for layer in called]
    names = ("maxvio", "maxvio_floor", "topk_score_sum", "router_entropy")
    return finite(
        {
            "format": FORMAT,
            "complete": data.complete,
            "domains": domains,
            "few_tokens": few,
            "left_out": [name for name in counts.domains if name not in domains],
            "tokens": dict(zip(domains, tokens.tolist(), strict=True)),
            "levels": {level: dict(zip(domains, labels, strict=True)) for level, labels in used_levels.items()},
            "nats": data.nats,
            "notes": [*data.notes, *idle, *([uncertain] if few else [])],
            "layers": layers,
            "mean": {name: float(np.mean([layer[name] for layer in layers])) for name in names}
            | {
                name: float(np.mean([layer[name]["value"] for layer in layers]))
                for name in ("domain_information_bits", "domain_distance")
            }
            | {
                "information_by_level": {
                    level: float(np.mean([layer["information_by_level"][level]["value"] for layer in layers]))
                    for level in [*used_levels, "domain"]
                }
            },
            "words": [words for layer in layers if (words := describe_imbalance(layer))],
        }
    )


def _layer(
    layer: LayerCounts,
    indices: Int[np.ndarray, " domains"],
    levels: Mapping[str, Sequence[str]],
    tokens: Int[np.ndarray, " domains"],
    vocabulary: Int[np.ndarray, " vocabulary"],
    occurrences: Int[np.ndarray, " vocabulary"],
    decode: Callable[[int], str],
) -> dict[str, Any]:
    by_domain = layer.load.numpy()[indices]
    load = by_domain.sum(0)
    information, share = domain_information(by_domain)
    distance = mean_domain_distance(by_domain)
    typical = typical_tokens(layer.by_token.numpy(), occurrences) if len(vocabulary) else []
    scores: Float[np.ndarray, " domains"] = layer.score_sum.numpy()[indices] / tokens
    rank_loads = {ranks: rank_load(load, ranks) for ranks in RANKS}
    return {
        "layer": layer.name,
        "experts": layer.num_experts,
        "k": layer.k,
        "load": load.tolist(),
        "load_by_domain": by_domain.tolist(),
        "maxvio": float(max_violation(layer.load[indices].sum(0))),
        "maxvio_floor": sampling_floor(int(tokens.sum()), layer.k, layer.num_experts),
        "maxvio_by_domain": max_violation(layer.load[indices]).tolist(),
        "dead_experts": int(dead_experts(layer.load[indices].sum(0))),
        "starved_experts": int(((load > 0) & (load < STARVED * load.mean())).sum()),
        "effective_experts": float(effective_experts(layer.load[indices].sum(0))),
        "domain_information_bits": {"value": information.value, "bound": information.bound, "share": share},
        "information_by_level": {
            level: {"value": information.value, "bound": information.bound}
            for level, information in information_by_level(by_domain, levels).items()
        },
        "domain_distance": {"value": distance.value, "bound": distance.bound},
        "topk_score_sum": float((scores * tokens).sum() / tokens.sum()),
        "topk_score_sum_by_domain": scores.tolist(),
        "router_entropy": float(layer.entropy.numpy()[indices].sum() / tokens.sum()),
        "partners": [[[other, round(share, 4)] for other, share in row] for row in partners(layer.together.numpy())],
        "rank_load": {str(ranks): value for ranks, value in rank_loads.items() if value is not None},
        "typical_tokens": [
            [
                {"text": decode(int(vocabulary[token.token_id])), "share": token.share, "count": token.count}
                for token in expert
            ]
            for expert in typical
        ],
    }


def describe_imbalance(layer: dict[str, Any]) -> str | None:
    """What is wrong with the balance of a layer of audit.json, in words. None if nothing is."""
    experts, problems = layer["experts"], []
    if layer["effective_experts"] <= COLLAPSED * experts:
        problems.append(f"collapsed: as uneven as {layer['effective_experts']:.1f} evenly used experts")
    if layer["dead_experts"]:
        problems.append(f"{layer['dead_experts']} of {experts} experts got no token")
    if layer["starved_experts"]:
        problems.append(f"{layer['starved_experts']} of {experts} experts got less than a tenth of the mean load")
    return f"{layer['layer']}: {', '.join(problems)}" if problems else None
