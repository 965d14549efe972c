"""How far an answer is from the right one."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from equipoise_lab.conformance import reference
from equipoise_lab.conformance.driver import Batch, Layer, NotOffered

__all__ = ["Measurement", "compare_biases", "compare_counts", "compare_gradients", "compare_value", "shown", "worst"]

GRADIENT_TOLERANCE = 1e-4  # of float32 gradients against float64 loops, relative by norm; 1e-6 is usual
VALUE_TOLERANCE = 1e-4  # of float32 values, relative
T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """The right answer and the one that came, in words, and how far apart they are."""

    right: str
    got: str
    error: float
    tolerance: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance  # False for nan


def shown(value: T | None, what: str) -> T:
    """The value that a driver gave.

    Raises:
        NotOffered: it gave none.
    """
    if value is None:
        raise NotOffered(what)
    return value


def compare_value(got: float, right: float, tolerance: float = VALUE_TOLERANCE) -> Measurement:
    scale = max(abs(right), 1.0)
    return Measurement(f"{right:.4g}", f"{got:.4g}", abs(got - right) / scale, tolerance)


def compare_counts(got: Sequence[Tensor | Sequence[int]], right: Sequence[Sequence[int]]) -> Measurement:
    """Compares counts by layer. The error is the largest difference. The words are about the first layer that
    differs."""
    pairs = [(_numbers(ours), list(truth)) for ours, truth in zip(got, right, strict=True)]
    errors = [max(abs(a - b) for a, b in zip(ours, truth, strict=True)) for ours, truth in pairs]
    ours, truth = pairs[max(range(len(pairs)), key=lambda layer: errors[layer])]
    return Measurement(_list(truth), _list(ours), max(errors), 0.0)


def compare_biases(
    got: Sequence[Tensor], right: Sequence[Sequence[float]], unit: float, tolerance: float = 1e-3
) -> Measurement:
    """Compares biases by layer, in units of the rate. A constant added to all biases does not matter."""
    errors, words = [], []
    for ours, truth in zip(got, right, strict=True):
        ours_centred, truth_centred = _centred(_numbers(ours)), _centred(truth)
        errors.append(max(abs(a - b) for a, b in zip(ours_centred, truth_centred, strict=True)) / unit)
        words.append((_list(value / unit for value in truth), _list(value / unit for value in _numbers(ours))))
    layer = max(range(len(errors)), key=lambda index: errors[index])
    return Measurement(words[layer][0], words[layer][1], errors[layer], tolerance)


def compare_gradients(got: Sequence[Tensor], ranks: Sequence[Sequence[Batch]], layer: Layer) -> Measurement:
    """Strength, the part along the right gradient, and distance, relative by norm: 1 and 0 are right.

    Micro-batches may weigh by their tokens or each the same, whatever comes closer: that is a convention.
    """
    ours = torch.cat([value.detach().double().flatten().cpu() for value in got])
    candidates = []
    for weighs in ("tokens", "micro_batches"):
        gradients = reference.loss_gradients(ranks, layer, weighs=weighs)
        right = torch.cat([value.flatten() for value in gradients])
        size = float(right.square().sum())
        strength, distance = float((ours * right).sum()) / size, float((ours - right).norm()) / math.sqrt(size)
        across = float((ours - strength * right).norm()) / math.sqrt(size)
        candidates.append((distance, strength, across))
    distance, strength, across = min(candidates)
    direction = "direction exact" if across <= GRADIENT_TOLERANCE else f"distance {distance:.3g}"
    return Measurement("strength 1", f"strength {strength:.4f}, {direction}", distance, GRADIENT_TOLERANCE)


def worst(measurements: Sequence[Measurement]) -> Measurement:
    """The part of an answer, or the rank, that is furthest off its tolerance."""
    return max(measurements, key=lambda m: math.inf if math.isnan(m.error) else m.error - m.tolerance)


def _numbers(values: Tensor | Sequence[float]) -> list[float]:
    return values.detach().double().cpu().flatten().tolist() if isinstance(values, Tensor) else list(values)


def _centred(values: Sequence[float]) -> list[float]:
    return [value - sum(values) / len(values) for value in values]


def _list(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
