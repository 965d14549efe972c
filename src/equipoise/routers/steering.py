"""Steers a router without a bias of its own: its top-k over the experts is made by biased scores."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode


class BiasedTopK(TorchFunctionMode):
    """Steers a top-k over the experts, by argument + bias or argument * (1 + bias); it gives the argument's values."""

    def __init__(self, bias: Float[Tensor, " experts"], multiplies: bool = False):
        super().__init__()
        self.bias, self.multiplies = bias, multiplies
        self._dimensions: list[int] = []  # of the arguments that were steered

    @property
    def num_choices(self) -> int:
        """How many choices of experts were steered.

        A top-k of more dimensions beside the choice ranks the experts inside a single expert group: [tokens, 1,
        experts]. A bias on it chooses nothing.
        """
        return self._dimensions.count(min(self._dimensions)) if self._dimensions else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk) and kwargs.get("out") is None:
            scores, k, is_sorted = _topk_of_experts(self.bias.shape[0], *args, **kwargs)
            if scores is not None:
                self._dimensions.append(scores.dim())
                plain = scores.detach()
                choice = plain * (1 + self.bias) if self.multiplies else plain + self.bias
                ids = torch.topk(choice, k, sorted=is_sorted).indices
                return torch.return_types.topk((scores.gather(-1, ids), ids))
        return func(*args, **kwargs)


def _topk_of_experts(
    num_experts: int, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, out: Any = None
) -> tuple[Tensor | None, int, bool]:
    """The scores, k and ``sorted`` of a call of ``torch.topk``; no scores if it ranks anything but the experts."""
    is_last = input.dim() >= 2 and dim in (-1, input.dim() - 1)
    ranks_experts = is_last and largest and input.shape[-1] == num_experts  # expert groups are fewer
    return input if ranks_experts else None, k, sorted
