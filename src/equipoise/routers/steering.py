"""Steers a router without a bias of its own: its top-k over the experts, or its maximum, is that of biased scores."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode


class BiasedTopK(TorchFunctionMode):
    """Steers a top-k over the experts, by argument + bias or argument * (1 + bias); it gives the argument's values.

    With ``by_max`` it steers a maximum over the experts, by which some routers choose one expert.
    """

    def __init__(self, bias: Float[Tensor, " experts"], multiplies: bool = False, by_max: bool = False):
        super().__init__()
        self.bias, self.multiplies, self.by_max = bias, multiplies, by_max
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
                ids = torch.topk(self._biased(scores), k, sorted=is_sorted).indices
                return torch.return_types.topk((scores.gather(-1, ids), ids))
        elif self.by_max and func in _MAXIMA and kwargs.get("out") is None:
            scores, keeps_dimension = _max_of_experts(self.bias.shape[0], *args, **kwargs)
            if scores is not None:
                ids = self._biased(scores).argmax(-1, keepdim=True)
                values = scores.gather(-1, ids)
                if not keeps_dimension:
                    ids, values = ids.squeeze(-1), values.squeeze(-1)
                return ids if func in _ARGMAXIMA else torch.return_types.max((values, ids))
        return func(*args, **kwargs)

    def _biased(self, scores: Tensor) -> Tensor:
        self._dimensions.append(scores.dim())
        plain = scores.detach()
        return plain * (1 + self.bias) if self.multiplies else plain + self.bias


_ARGMAXIMA = (torch.argmax, Tensor.argmax)
_MAXIMA = (torch.max, Tensor.max, *_ARGMAXIMA)


def _topk_of_experts(
    num_experts: int, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, out: Any = None
) -> tuple[Tensor | None, int, bool]:
    """The scores, k and ``sorted`` of a call of ``torch.topk``; no scores if it ranks anything but the experts."""
    is_last = input.dim() >= 2 and dim in (-1, input.dim() - 1)
    ranks_experts = is_last and largest and input.shape[-1] == num_experts  # expert groups are fewer
    return input if ranks_experts else None, k, sorted


def _max_of_experts(
    num_experts: int, input: Tensor, dim: Any = None, keepdim: bool = False, **_: Any
) -> tuple[Tensor | None, bool]:
    """The scores of a maximum over the experts, and whether it keeps their dimension; no scores for any other."""
    is_last = input.dim() >= 2 and isinstance(dim, int) and dim in (-1, input.dim() - 1)
    return input if is_last and input.shape[-1] == num_experts else None, keepdim
