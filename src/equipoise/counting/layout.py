"""What is counted of a micro-batch: one vector for the loads of all layers, and what balancers count besides."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from equipoise.counting.call import FittedMask
from equipoise.errors import EquipoiseError


def outside_inference_mode() -> AbstractContextManager[Any]:
    """For tensors that outlive the forward: a tensor made in inference mode could not be changed later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def check_no_capture(device: torch.device) -> None:
    """Raises while a graph of this device's kernels is captured. Its replays run no Python: nothing would be counted,
    and the gradient of a loss would be the one of the capture."""
    if device.type == "cpu":
        return
    of_device = torch.get_device_module(device)
    can_capture = hasattr(of_device, "is_current_stream_capturing") and of_device.is_initialized()
    if can_capture and of_device.is_current_stream_capturing():
        raise EquipoiseError(
            "a router must be counted outside a CUDA graph: one is being captured, and its replays run no Python. "
            "Leave the routers out of the capture, or capture an evaluation (eval(), or inside balance.paused()). "
            'torch.compile(mode="reduce-overhead") leaves them out by itself.'
        )


class Layout:
    """The layout of an int64 vector of counts,

        [ load of layer 0 | load of layer 1 | ... | three numbers for ``Exchange`` ]

    so that one all-reduce of it pools every layer. The three numbers, summed over the ranks: how many ranks close the
    window; how many micro-batches these had; the others' micro-batch numbers. ``k``: experts per token, by layer.
    """

    def __init__(self, num_experts: Sequence[int], k: Sequence[int]):
        self.num_experts, self.k = tuple(num_experts), tuple(k)
        ends = list(itertools.accumulate(num_experts))
        self.slices = [slice(end - size, end) for size, end in zip(num_experts, ends, strict=True)]
        self.num_layers = len(num_experts)
        self.loads = slice(0, ends[-1] if ends else 0)
        self.header = slice(self.loads.stop, self.loads.stop + 3)
        self._ones: dict[torch.device, Tensor] = {}

    def zeros(self, device: torch.device) -> Int[Tensor, " numbers"]:
        with outside_inference_mode():
            return torch.zeros(self.header.stop, dtype=torch.int64, device=device)

    def block(self, layers: Sequence[int]) -> slice | None:
        """Where the loads of these layers are, if they are adjacent and of equal size; else None."""
        slices = [self.slices[layer] for layer in layers]
        are_equal = len({self.num_experts[layer] for layer in layers}) == 1
        are_adjacent = all(a.stop == b.start for a, b in itertools.pairwise(slices))
        return slice(slices[0].start, slices[-1].stop) if are_equal and are_adjacent else None

    def load(self, vector: Tensor, layer: int) -> Int[Tensor, " experts"]:
        """The load of one layer. A view."""
        return vector[self.slices[layer]]

    def num_tokens(self, vector: Tensor, layer: int) -> Int[Tensor, ""]:
        """The unmasked tokens of one layer: each has k assignments."""
        return self.load(vector, layer).sum() // self.k[layer]

    def count(self, vector: Tensor, layer: int, expert_ids: Tensor, mask: FittedMask | None) -> None:
        """Adds one call, in place: k assignments for each unmasked token. Waits for no GPU.

        Raises ``EquipoiseError`` while a CUDA graph is captured.
        """
        check_no_capture(expert_ids.device)
        ids, load = expert_ids.reshape(-1), self.load(vector, layer)
        if mask is not None:
            load.scatter_add_(0, ids, mask.assignments(expert_ids.shape[-1]))
        elif ids.device.type == "cpu":
            load.add_(torch.bincount(ids, minlength=len(load)))  # on a GPU bincount would make the host wait
        else:
            load.scatter_add_(0, ids, self._one(ids.device).expand_as(ids))

    def _one(self, device: torch.device) -> Int[Tensor, ""]:
        if device not in self._ones:
            with outside_inference_mode():
                self._ones[device] = torch.ones((), dtype=torch.int64, device=device)
        return self._ones[device]


def _address(value: Tensor) -> int:
    """The address of a tensor's memory. An empty tensor has none, and gets its id."""
    return value.untyped_storage().data_ptr() or id(value)


class Statistics:
    """The statistics of balancers, by (layer, number of the balancer).

    ``gathered`` says of each balancer whether its values are concatenated; those of the others are summed.
    """

    def __init__(self, gathered: Sequence[bool]):
        self.gathered = gathered
        self.values: dict[tuple[int, int], Tensor] = {}
        self._held: set[int] = set()  # the addresses of the values

    def add(self, layer: int, balancer: int, value: Tensor) -> None:
        """Takes ``value`` over, and adds to it later."""
        with outside_inference_mode():
            self._put(layer, balancer, value.clone() if value.is_inference() else value.contiguous())

    def merge(self, other: "Statistics") -> None:
        """Takes over what ``other`` holds."""
        for (layer, balancer), value in other.values.items():
            self._put(layer, balancer, value)

    def fill_in(self, other: "Statistics") -> None:
        """Takes over what ``other`` holds for layers without statistics here."""
        self.values = other.values | self.values

    def _put(self, layer: int, balancer: int, value: Tensor) -> None:
        if _address(value) in self._held:
            raise EquipoiseError(
                "a balancer's statistic() must return a new tensor each time: it returned one, or a view of one, that "
                "it had returned for an earlier call. Return a clone."
            )
        before = self.values.get((layer, balancer))
        if before is not None and not self.gathered[balancer]:
            before.add_(value)
            return
        if before is not None:
            self._held.discard(_address(before))
            value = torch.cat([before, value])
        self.values[layer, balancer] = value
        self._held.add(_address(value))

    def of(self, layers: Sequence[int], balancer: int) -> list[Tensor] | None:
        """One balancer's statistics of these layers; None if it has none."""
        if not self.values:
            return None
        return [self.values[layer, balancer] for layer in layers if (layer, balancer) in self.values] or None

    @property
    def summed(self) -> list[Tensor]:
        """The values that are summed over the ranks, in the same order on every rank."""
        return [self.values[key] for key in sorted(self.values) if not self.gathered[key[1]]]

    def gather(self, gather: Callable[[Any], list[Any]]) -> None:
        """Concatenates the ranks' values of the other balancers. ``gather`` gives the Python value of every rank."""
        keys = [key for key in sorted(self.values) if self.gathered[key[1]]]
        if keys:
            by_rank = gather([self.values[key].cpu() for key in keys])
            for index, key in enumerate(keys):
                rows = torch.cat([values[index] for values in by_rank])
                self.values[key] = rows.to(self.values[key].device)
