"""Sees and steers the choice of experts inside a forward: its top-k over the experts, or its maxima."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from equipoise.errors import EquipoiseError


class BiasedTopK(TorchFunctionMode):
    """Steers a top-k over the experts, by argument + bias or argument * (1 + bias); it gives the argument's values.

    With ``by_max`` it steers a maximum over the experts, by which some routers choose one expert. Others choose
    ``num_maxima`` experts one after another, each by a maximum over those that are left (GShard). The bias acts on the
    argument of the first maximum. Later arguments, such as logits, only decide between equal scores.

    ``on_choice`` is called with the values and the ids of each choice, ``[..., k]``, and returns the values that the
    forward gets.

    ``recorded``: ids ``[tokens, k]`` that are chosen instead, but for tokens where they are -1. With ``has_groups`` the
    forward first chooses expert groups, whose other experts lose their scores: it then chooses those of ``recorded``.
    """

    def __init__(
        self,
        bias: Float[Tensor, " experts"] | None,
        multiplies: bool = False,
        by_max: bool = False,
        num_experts: int = 0,
        on_choice: Callable[[Tensor, Tensor], Tensor] | None = None,
        recorded: Int[Tensor, "tokens k"] | None = None,
        has_groups: bool = False,
        num_maxima: int = 1,
    ):
        super().__init__()
        self.bias, self.multiplies, self.by_max, self.on_choice = bias, multiplies, by_max, on_choice
        self.num_experts = num_experts if bias is None else bias.shape[0]
        self.recorded, self.has_groups, self.num_maxima = recorded, has_groups, num_maxima
        self._remaining: list[Tensor] = []  # of a choice by maxima that is not complete: what is ranked, after each
        self._dimensions: list[int] = []  # of the arguments that were steered
        self._replayed: list[int] = []  # likewise, of those whose choice was that of the record
        self.num_group_choices = 0  # that were made by the record

    @property
    def num_choices(self) -> int:
        """How many choices of experts were steered.

        A top-k of more dimensions beside the choice ranks the experts inside a single expert group: [tokens, 1,
        experts]. A bias on it chooses nothing. The number is 0 if the maxima do not make whole choices.
        """
        if self._remaining:
            return 0
        return self._dimensions.count(min(self._dimensions)) if self._dimensions else 0

    @property
    def num_replayed(self) -> int:
        """How many of these the record made."""
        return self._replayed.count(min(self._dimensions)) if self._dimensions else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOP_K and kwargs.get("out") is None:
            scores, k, is_sorted = _topk_of_experts(self.num_experts, *args, **kwargs)
            if scores is not None:
                self._dimensions.append(scores.dim())
                ids = self._chosen(torch.topk(self._biased(scores), k, sorted=is_sorted).indices)
                return torch.return_types.topk((self._values(scores, ids), ids))
            if self.recorded is not None and self.has_groups:
                return self._groups_of_record(*args, **kwargs)
        elif self.by_max and func in _MAXIMA and kwargs.get("out") is None:
            scores, keeps_dimension = _max_of_experts(self.num_experts, *args, **kwargs)
            if scores is not None:
                ids = self._next_maximum(scores)
                values = self._values(scores, ids)
                if not keeps_dimension:
                    ids, values = ids.squeeze(-1), values.squeeze(-1)
                return ids if func in _ARGMAXIMA else torch.return_types.max((values, ids))
        return func(*args, **kwargs)

    def _biased(self, scores: Tensor) -> Tensor:
        plain = scores.detach()
        if self.bias is None:
            return plain
        return plain * (1 + self.bias) if self.multiplies else plain + self.bias

    def _next_maximum(self, argument: Tensor) -> Tensor:
        """The id of the next expert of a choice by maxima, ``[..., 1]``: the best that is not chosen."""
        ranked = self._remaining[-1] if self._remaining else self._biased(argument)
        best = ranked.argmax(-1, keepdim=True)
        if self._remaining:  # softmax scores that are rounded to 0 are equal where the logits differ
            by_logit = argument.detach().argmax(-1, keepdim=True)
            best = torch.where(ranked.gather(-1, by_logit) == ranked.gather(-1, best), by_logit, best)
        number = len(self._remaining)
        ids = self._chosen(best, number)
        if number + 1 < self.num_maxima:
            self._remaining.append(ranked.scatter(-1, ids, -torch.inf))
        else:
            self._remaining = []
            self._dimensions.append(argument.dim())
        return ids

    def _chosen(self, ids: Tensor, number: int = 0) -> Tensor:
        """The ids of the record, where it has any. A top-k of another number than k chooses no experts.

        ``number``: how many maxima of the same choice were before.
        """
        if self.recorded is None:
            return ids
        recorded = self.recorded if self.num_maxima == 1 else self.recorded[..., number : number + 1]
        if recorded.numel() != ids.numel() or recorded.shape[-1] != ids.shape[-1]:
            return ids
        if number == 0:
            self._replayed.append(ids.dim())
        recorded = recorded.to(ids.device).reshape(ids.shape)
        return torch.where(recorded < 0, ids, recorded)

    def _groups_of_record(
        self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, out: Any = None
    ) -> Any:
        """A top-k over ``[tokens, groups]``: it has the groups of the recorded experts, then the best of the others."""
        assert self.recorded is not None
        num_groups = input.shape[-1]
        is_last = input.dim() == 2 and dim in (-1, 1) and largest and input.shape[0] == self.recorded.shape[0]
        if not is_last or not k < num_groups or self.num_experts % num_groups:
            return torch.topk(input, k, dim, largest, sorted)
        self.num_group_choices += 1
        recorded = self.recorded.to(input.device)
        groups = torch.where(recorded < 0, num_groups, recorded // (self.num_experts // num_groups))
        is_recorded = input.new_zeros(input.shape[0], num_groups + 1).scatter(1, groups, 1)[:, :num_groups] > 0
        if not torch.compiler.is_compiling() and input.device.type == "cpu" and (is_recorded.sum(-1) > k).any():
            raise EquipoiseError(
                f"the recorded experts of a token must be in at most {k} of {num_groups} expert groups, as the "
                f"router chooses: got experts of {int(is_recorded.sum(-1).max())}. The record is of another model."
            )
        ids = torch.topk(input.detach().masked_fill(is_recorded, torch.inf), k, sorted=sorted).indices
        return torch.return_types.topk((input.gather(-1, ids), ids))

    def _values(self, scores: Tensor, ids: Tensor) -> Tensor:
        values = scores.gather(-1, ids)
        return values if self.on_choice is None else self.on_choice(values, ids)


class ChoicesSeen(TorchFunctionMode):
    """Keeps the ids of each top-k and of each maximum over the experts, ``[..., k]``.

    Without ``num_experts`` a softmax shows how many they are. What it takes is kept in ``logits``.
    """

    def __init__(self, num_experts: int = 0):
        super().__init__()
        self.num_experts = num_experts
        self.top_k: list[Tensor] = []
        self.maxima: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def expert_ids(self) -> Tensor | None:
        """The expert ids of the only choice, by top-k or by maxima in turn. None if there were several, or none."""
        if self.top_k:
            return self.top_k[0] if len(self.top_k) == 1 else None
        return torch.cat(self.maxima, -1) if self.maxima else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            self.logits.append(logits)
            self.num_experts = self.num_experts or logits.shape[-1]
        elif func in _TOP_K and _topk_of_experts(self.num_experts, *args, **kwargs)[0] is not None:
            self.top_k.append(result.indices)
        elif func in _MAXIMA:
            scores, keeps_dimension = _max_of_experts(self.num_experts, *args, **kwargs)
            if scores is not None:
                ids = result if func in _ARGMAXIMA else result.indices
                self.maxima.append(ids if keeps_dimension else ids.unsqueeze(-1))
        return result


_SOFTMAX = (torch.softmax, Tensor.softmax, torch.nn.functional.softmax)
_TOP_K = (torch.topk, Tensor.topk)
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
