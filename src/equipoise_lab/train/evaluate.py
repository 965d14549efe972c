"""Quality, balance and specialisation of a model on held-out text, domain by domain."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise import metrics
from equipoise.balance import Balance
from equipoise_lab.experts.result import Audited
from equipoise_lab.experts.watch import choose_vocabulary, watching
from equipoise_lab.train.data import Corpus
from equipoise_lab.train.ranks import ALONE, Ranks
from equipoise_lab.train.wrappers import is_sharded

__all__ = ["evaluate", "language_model_loss"]


def language_model_loss(model: nn.Module, input_ids: Int[Tensor, "sequences length"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token, in nats, in float32. No balancing loss is in it."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    balance: Balance,
    corpus: Corpus,
    *,
    split: str,
    sequence_length: int,
    most_sequences: int,
    sequences: int,
    k: int,
    device: torch.device,
    autocast: bool,
    ranks: Ranks = ALONE,
    by_token: bool = False,
) -> tuple[dict[str, Any], Audited]:
    """Figures of the model on ``split``; every domain gives the same number of sequences, dealt to the ranks.

    Returns the figures and what the routers did, counted by domain and, ``by_token``, by token id too. The figures are
    ``val_nats`` (mean over tokens), ``val_perplexity``, ``val_bits_per_byte``, ``maxvio_global`` (all domains
    pooled), ``maxvio_floor``, ``domain_information_bits`` and ``max_domain_share`` (means over layers),
    ``topk_score_sum`` (mean over layers and domains), ``dead_experts`` (sum over layers), and by domain ``nats``,
    ``bits_per_byte``, ``tokens``, ``load`` (layers x experts), ``topk_score_sum`` (layers).
    """
    rows = {domain: corpus.sequences(split, domain, sequence_length) for domain in corpus.domains}
    num = min([most_sequences, *map(len, rows.values())])
    vocabulary, notes = choose_vocabulary(model, (rows[d][:num] for d in corpus.domains)) if by_token else ([], [])
    was_training = model.training
    model.eval()
    firsts = range(0, num, sequences)  # the first sequence of each batch of a domain
    mine = firsts[ranks.rank :: ranks.size]
    idle = is_sharded(model) and len(mine) < len(firsts[:: ranks.size])  # no batch left, and the others need our shards

    def total_nats(domain: str, first: int) -> float:
        batch = torch.from_numpy(rows[domain][first : min(first + sequences, num)].astype(np.int64))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return float(language_model_loss(model, batch.to(device))) * len(batch)

    totals: dict[str, float] = {}
    loads: dict[str, dict[str, Tensor]] = {}
    try:
        with watching(model, corpus.domains, vocabulary) as watched:
            for number, domain in enumerate(corpus.domains):
                with balance.measuring() as loads[domain]:
                    totals[domain], watched.domain = 0.0, number
                    for first in mine:
                        totals[domain] += total_nats(domain, first)
                    if idle:
                        watched.domain = None
                        with balance.paused():
                            total_nats(domain, 0)
    finally:
        model.train(was_training)
    ranks.add_up(watched.sums())
    domains: dict[str, Any] = {}
    nats_sum = bytes_sum = 0.0
    for number, (domain, total) in enumerate(ranks.sum(totals).items()):
        nats, bytes_per_token = total / num, corpus.bytes_per_token(split, domain, num * sequence_length)
        nats_sum, bytes_sum = nats_sum + nats, bytes_sum + bytes_per_token
        domains[domain] = {
            "nats": nats,
            "bits_per_byte": nats / bytes_per_token / math.log(2),
            "tokens": num * sequence_length,
            "load": [layer.tolist() for layer in loads[domain].values()],
            "topk_score_sum": [float(layer.score_sum[number]) / (num * sequence_length) for layer in watched.layers],
        }
    by_domain = [[torch.tensor(layer) for layer in row["load"]] for row in domains.values()]
    layers = [torch.stack(layer) for layer in zip(*by_domain, strict=True)]  # of each layer (domains, experts)
    pooled = {str(index): layer.sum(0) for index, layer in enumerate(layers)}
    tokens = num * sequence_length * len(domains)
    floors = [metrics.sampling_floor(tokens, k, layer.shape[-1]) for layer in layers]
    nats = nats_sum / len(domains)
    by_layer = [value for row in domains.values() for value in row["topk_score_sum"]]
    figures = {
        "split": split,
        "val_nats": nats,
        "val_perplexity": math.exp(min(nats, 700.0)),
        "val_bits_per_byte": nats_sum / bytes_sum / math.log(2),
        "maxvio_global": float(metrics.max_violation(pooled)),
        "maxvio_floor": sum(floors) / len(floors),
        "domain_information_bits": float(torch.stack([metrics.domain_information(x) for x in layers]).mean()),
        "max_domain_share": float(torch.stack([metrics.max_domain_share(x) for x in layers]).mean()),
        "topk_score_sum": sum(by_layer) / len(by_layer),
        "dead_experts": float(metrics.dead_experts(pooled)),
        "domains": domains,
    }
    return figures, Audited(watched, {domain: row["nats"] for domain, row in domains.items()}, tuple(notes))
