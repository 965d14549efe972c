"""The number of items in a batch that the Trainer passes: who divides by it, and which part of it a micro-batch has."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from equipoise.errors import UsageError

__all__ = ["NumItems", "label_share", "loss_shifts_labels"]

IGNORED_LABEL = -100  # of a token that is not a target


def label_share(inputs: dict[str, Any], num_items: Tensor | float | None, shifts: bool) -> Tensor | float:
    """n / N: the label tokens of a micro-batch over ``num_items_in_batch``, for a loss that divides by N.

    1 if the Trainer does not pass that number: it then divides by the number of micro-batches itself.

    Args:
        inputs: what the model's forward, or ``compute_loss``, was called with, by name.
        shifts: whether the loss shifts ``labels``, so that the first one of a row is not a target.
    """
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        labels = labels[..., 1:] if shifts and isinstance(labels, Tensor) else labels
    if num_items is None or not isinstance(labels, Tensor):
        return 1.0
    num_labels = labels.ne(IGNORED_LABEL).sum()
    return num_labels / (num_items.to(num_labels.device) if isinstance(num_items, Tensor) else num_items)


def loss_shifts_labels(model: nn.Module) -> bool:
    """Whether the loss predicts label i + 1 at position i. The same question as the Trainer asks."""
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


class NumItems:
    """The number of items in a batch, and whether a loss is computed with it.

    Attributes:
        value: the number as it came.
        number: the same, with a gradient: to be passed on in its place.
    """

    def __init__(self, value: Tensor | float):
        self.value = value
        plain = torch.as_tensor(value).detach()
        self._leaf = (plain if plain.is_floating_point() else plain.float()).clone().requires_grad_()
        self.number = (self._leaf * 1).as_subclass(_Watched)  # no leaf, which could not be written into

    def are_used_by(self, loss: Tensor | None) -> bool:
        """Raises ``UsageError`` if the number was read without autograd, so that nobody can say."""
        nodes, seen = deque([None if loss is None else loss.grad_fn]), set()
        while nodes:
            node = nodes.popleft()
            if node is None or node in seen:
                continue
            if getattr(node, "variable", None) is self._leaf:
                return True
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
        if self.number.was_read:
            raise UsageError(
                "the loss must use num_items_in_batch as a tensor, or not at all: the model or compute_loss reads it "
                "as a plain number (item(), int()), so it cannot be known whether the loss divides by it and how much "
                "the balancing loss must weigh. Divide by the tensor; or set model.accepts_loss_kwargs = False, so "
                "that the Trainer does not pass it; or add callback.balance.loss() to your own loss, with the same "
                "weight, and say so with EquipoiseCallback(..., add_loss=False)."
            )
        return False


_TO_PLAIN = (Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.numpy)


class _Watched(Tensor):
    """A number that notes when it is read in a way that autograd does not see. A comparison does not count."""

    was_read = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _TO_PLAIN:
            return function(args[0].detach(), *args[1:], **(kwargs or {}))
        result = super().__torch_function__(function, types, args, kwargs)
        if isinstance(result, Tensor) and not result.requires_grad and result.dtype != torch.bool:
            for value in args:
                if isinstance(value, cls):
                    value.was_read = True
        return result.as_subclass(Tensor) if isinstance(result, cls) else result
