"""What balancers count besides the load."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.counting.exchange import Exchange
from equipoise.counting.layout import outside_inference_mode

__all__ = ["Statistics"]


class Statistics:
    """The statistics of balancers, by (layer, number of the balancer).

    ``gathered`` says of each balancer whether its values are concatenated; those of the others are summed.
    """

    def __init__(self, gathered: Sequence[bool]):
        self.gathered = gathered
        self.values: dict[tuple[int, int], Tensor] = {}

    def add(self, layer: int, balancer: int, value: Tensor) -> None:
        with outside_inference_mode():
            copy = value.clone(memory_format=torch.contiguous_format)  # the balancer may change its tensor later
            self._put(layer, balancer, copy)

    def merge(self, other: "Statistics") -> None:
        """Takes over what ``other`` holds."""
        for (layer, balancer), value in other.values.items():
            self._put(layer, balancer, value)

    def fill_in(self, other: "Statistics") -> None:
        """Takes over what ``other`` holds for layers without statistics here."""
        for key, value in other.values.items():
            self.values.setdefault(key, value)

    def _put(self, layer: int, balancer: int, value: Tensor) -> None:
        before = self.values.get((layer, balancer))
        if before is None:
            self.values[layer, balancer] = value
        elif self.gathered[balancer]:
            self.values[layer, balancer] = torch.cat([before, value])
        else:
            before.add_(value)

    def of(self, layers: Sequence[int], balancer: int) -> list[Tensor] | None:
        """One balancer's statistics of these layers; None if it has none."""
        if not self.values:
            return None
        return [self.values[layer, balancer] for layer in layers if (layer, balancer) in self.values] or None

    @property
    def summed(self) -> list[Tensor]:
        """The values that are summed over the ranks, in the same order on every rank."""
        return [self.values[key] for key in sorted(self.values) if not self.gathered[key[1]]]

    def gather(self, exchange: Exchange) -> None:
        """Concatenates the ranks' values of the other balancers."""
        keys = [key for key in sorted(self.values) if self.gathered[key[1]]]
        if keys:
            by_rank = exchange.gather([self.values[key].cpu() for key in keys])
            for index, key in enumerate(keys):
                rows = torch.cat([values[index] for values in by_rank])
                self.values[key] = rows.to(self.values[key].device)
