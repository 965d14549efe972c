"""The right answers: plain loops in Python's floats (float64). Shares no code with the library or a framework.

Formulas, per layer, over the tokens of a scope:

    f_e = c_e / (k N)                                Demons in the Detail, Eq. 1 to 3; Switch, Eq. 4 and 5
    P_e = mean over tokens of s_te / sum_j s_tj
    loss = E sum_e f_e P_e                           f is a constant of the gradient
    b_e += rate * sign(mean(c) - c_e)                Loss-Free Balancing, Algorithm 1
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise_lab.conformance.driver import Batch, Layer

__all__ = ["chosen", "counts", "loss", "loss_gradients", "moved"]


class _Token(NamedTuple):
    logits: list[float]
    experts: list[int]
    sequence: int


def _scores(logits: Sequence[float], function: str) -> list[float]:
    if function == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    return [power / sum(powers) for power in powers]


def chosen(logits: Sequence[float], layer: Layer, bias: Sequence[float]) -> list[int]:
    """The experts of a token. A group's score is the sum of its two best biased scores, as in DeepSeek-V3."""
    biased = [s + b for s, b in zip(_scores(logits, layer.score_function), bias, strict=True)]
    allowed = set(range(layer.experts))
    if layer.groups is not None:
        number, top = layer.groups
        size = layer.experts // number
        groups = [range(g * size, (g + 1) * size) for g in range(number)]
        ranked = sorted(groups, key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
        allowed = {e for group in ranked[:top] for e in group}
    return sorted(allowed, key=lambda e: -biased[e])[: layer.k]


def _tokens(batch: Batch, number: int, layer: Layer, bias: Sequence[float]) -> list[_Token]:
    """The unmasked tokens of a micro-batch at one layer."""
    rows, length = batch.logits.shape[1:3]
    tokens = []
    for row in range(rows):
        for place in range(length):
            if batch.mask is not None and not bool(batch.mask[row, place]):
                continue
            logits = batch.logits[number, row, place].double().tolist()
            experts = chosen(logits, layer, bias)
            if batch.replayed is not None:
                experts = batch.replayed[number, row, place].tolist()
            sequence = row if batch.sequence_ids is None else row * 1_000_000 + int(batch.sequence_ids[row, place])
            tokens.append(_Token(logits, experts, sequence))
    return tokens


def _count(tokens: Sequence[_Token], experts: int) -> list[int]:
    result = [0] * experts
    for token in tokens:
        for expert in token.experts:
            result[expert] += 1
    return result


def counts(ranks: Sequence[Sequence[Batch]], layer: Layer, bias: Sequence[float] | None = None) -> list[list[int]]:
    """By layer, the assignments of all training micro-batches of all ranks, ``[experts]``."""
    bias = _start(layer) if bias is None else bias
    result = []
    for number in range(layer.number):
        batches = [batch for rank in ranks for batch in rank if batch.mode == "train"]
        parts = [_count(_tokens(batch, number, layer, bias), layer.experts) for batch in batches]
        result.append([sum(column) for column in zip(*parts, strict=True)])
    return result


def moved(bias: Sequence[float], count: Sequence[int], rate: float) -> list[float]:
    """The bias after one update by the sign rule, not centred."""
    mean = sum(count) / len(count)
    return [b + rate * ((mean > c) - (mean < c)) for b, c in zip(bias, count, strict=True)]


def loss(batch: Batch, layer: Layer, bias: Sequence[float] | None = None) -> float:
    """The value of one micro-batch on one rank, summed over layers."""
    bias = _start(layer) if bias is None else bias
    total = 0.0
    for number in range(layer.number):
        tokens = _tokens(batch, number, layer, bias)
        for group in _groups(tokens, layer):
            share = _share(group, layer)
            mean_scores = [0.0] * layer.experts
            for token in group:
                scores = _scores(token.logits, layer.score_function)
                for expert, score in enumerate(scores):
                    mean_scores[expert] += score / sum(scores) / len(group)
            value = sum(f * p for f, p in zip(share, mean_scores, strict=True)) / sum(share)
            total += layer.experts * value * len(group) / len(tokens)
    return total


def _share(tokens: Sequence[_Token], layer: Layer) -> list[int]:
    """What f counts: all choices, or the first of each token under GShard's definition."""
    if layer.counts_first_choice:
        tokens = [token._replace(experts=token.experts[:1]) for token in tokens]
    return _count(tokens, layer.experts)


def _groups(tokens: Sequence[_Token], layer: Layer) -> list[list[_Token]]:
    """Sequences, under the loss within sequences; else all tokens."""
    groups: dict[int, list[_Token]] = {}
    for token in tokens:
        groups.setdefault(token.sequence if layer.loss == "sequence" else 0, []).append(token)
    return list(groups.values())


def loss_gradients(
    ranks: Sequence[Sequence[Batch]], layer: Layer, *, weighs: str, bias: Sequence[float] | None = None
) -> list[Tensor]:
    """By layer, the gradient at the gate ``[experts, experts]`` of one optimizer step, over all ranks, float64.

    Under scope ``global_batch``, f of a micro-batch counts the tokens of all ranks in it and in those before it: the
    buffer of Demons in the Detail, section 3.2. ``weighs``: a micro-batch weighs by its ``tokens``, or each the
    same (``micro_batches``). Both are conventions of trainers.
    """
    bias = _start(layer) if bias is None else bias
    windows = [[batch for batch in rank if batch.mode == "train"] for rank in ranks]
    steps = len(windows[0])
    gradients = []
    for number in range(layer.number):
        tokens = [[_tokens(batch, number, layer, bias) for batch in window] for window in windows]
        all_tokens = sum(len(part) for window in tokens for part in window)
        gradient = [[0.0] * layer.experts for _ in range(layer.experts)]
        pooled = [0] * layer.experts
        for step in range(steps):
            for window in tokens:
                pooled = [a + b for a, b in zip(pooled, _share(window[step], layer), strict=True)]
            for window in tokens:
                part = window[step]
                share = len(part) / all_tokens if weighs == "tokens" else 1 / (steps * len(windows))
                for group in _groups(part, layer):
                    count = pooled if layer.loss == "global_batch" else _share(group, layer)
                    weight = share * len(group) / len(part) * layer.experts / sum(count)
                    for token in group:
                        _add_gradient(gradient, token, count, weight / len(group), layer.score_function)
        gradients.append(torch.tensor(gradient, dtype=torch.float64))
    return gradients


def _add_gradient(
    gradient: list[list[float]], token: _Token, count: Sequence[int], weight: float, function: str
) -> None:
    """Adds weight * d(sum_e count_e s_e / sum_j s_j)/d(gate) of one token, whose hidden state is its logits."""
    scores = _scores(token.logits, function)
    total = sum(scores)
    value = sum(c * s for c, s in zip(count, scores, strict=True)) / total
    for expert, score in enumerate(scores):
        # d s_e / d z_e is s_e (1 - s_e) for the sigmoid; the softmax's sum is constant, so its slope is s_e alone.
        slope = score * (1 - score) if function == "sigmoid" else score
        at_logit = weight * slope * (count[expert] - value) / total
        for column, hidden in enumerate(token.logits):
            gradient[expert][column] += at_logit * hidden


def _start(layer: Layer) -> Sequence[float]:
    return layer.bias or [0.0] * layer.experts
