"""Measures quality, balance and specialisation of a model on held-out text, domain by domain."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise import metrics
from equipoise.balance import Balance
from equipoise_lab.experts.result import AuditData
from equipoise_lab.experts.watch import choose_vocabulary, watching
from equipoise_lab.train.data import Corpus
from equipoise_lab.train.ranks import ONE_PROCESS, Ranks
from equipoise_lab.train.wrappers import is_sharded

__all__ = ["evaluate", "language_model_loss"]


def language_model_loss(model: nn.Module, input_ids: Int[Tensor, "sequences length"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token, in nats, computed in float32. Contains no balancing loss."""
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
    ranks: Ranks = ONE_PROCESS,
    by_token: bool = False,
) -> tuple[dict[str, Any], AuditData]:
    """Evaluates the model on ``split``. Every domain gives the same number of sequences; the ranks share them.

    Returns the figures, and what the routers did. The latter is counted by domain and, with ``by_token``, also by token
    id. The figures are:

    - ``val_nats`` (mean over tokens), ``val_perplexity``, ``val_bits_per_byte``;
    - ``maxvio_global`` (all domains pooled), ``maxvio_floor``;
    - ``domain_information_bits`` and ``max_domain_share`` (means over layers);
    - ``topk_score_sum`` (mean over layers and domains), ``dead_experts`` (sum over layers);
    - ``domains``: for each domain ``nats``, ``bits_per_byte``, ``tokens``, ``load`` (layers x experts) and
      ``topk_score_sum`` (by layer).
    """
    rows = {domain: corpus.sequences(split, domain, sequence_length) for domain in corpus.domains}
    num = min([most_sequences, *map(len, rows.values())])
    vocabulary, notes = choose_vocabulary(model, (rows[d][:num] for d in corpus.domains)) if by_token else ([], [])
    was_training = model.training
    model.eval()
    starts = range(0, num, sequences)  # index of the first sequence in each batch of a domain
    rank_starts = starts[ranks.rank :: ranks.size]
    # A rank without a batch in the last round must still run a forward: the others need its shards.
    runs_empty_forward = is_sharded(model) and len(rank_starts) < len(starts[:: ranks.size])

    def total_nats(domain: str, start: int) -> float:
        batch = torch.from_numpy(rows[domain][start : min(start + sequences, num)].astype(np.int64))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return float(language_model_loss(model, batch.to(device))) * len(batch)

    totals: dict[str, float] = {}
    loads: dict[str, dict[str, Tensor]] = {}
    try:
        with watching(model, corpus.domains, vocabulary) as watched:
            for number, domain in enumerate(corpus.domains):
                with balance.measuring() as loads[domain]:
                    totals[domain], watched.domain = 0.0, number
                    for start in rank_starts:
                        totals[domain] += total_nats(domain, start)
                    if runs_empty_forward:
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
    layers = [torch.stack(layer) for layer in zip(*by_domain, strict=True)]  # one (domains, experts) tensor a layer
    pooled = {str(index): layer.sum(0) for index, layer in enumerate(layers)}
    tokens = num * sequence_length * len(domains)
    floors = [metrics.sampling_floor(tokens, k, layer.shape[-1]) for layer in layers]
    nats = nats_sum / len(domains)
    score_sums = [value for row in domains.values() for value in row["topk_score_sum"]]
    figures = {
        "split": split,
        "val_nats": nats,
        "val_perplexity": math.exp(min(nats, 700.0)),
        "val_bits_per_byte": nats_sum / bytes_sum / math.log(2),
        "maxvio_global": float(metrics.max_violation(pooled)),
        "maxvio_floor": sum(floors) / len(floors),
        "domain_information_bits": float(torch.stack([metrics.domain_information(x) for x in layers]).mean()),
        "max_domain_share": float(torch.stack([metrics.max_domain_share(x) for x in layers]).mean()),
        "topk_score_sum": sum(score_sums) / len(score_sums),
        "dead_experts": float(metrics.dead_experts(pooled)),
        "domains": domains,
    }
    return figures, AuditData(watched, {domain: row["nats"] for domain, row in domains.items()}, tuple(notes))
