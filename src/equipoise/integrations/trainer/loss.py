"""Adds the balancing loss to the loss in the model's output, with the weight that the Trainer gives the latter."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from equipoise.balance import Balance
from equipoise.errors import EquipoiseError, UsageError

__all__ = ["OutputLoss", "label_share", "shifts_labels"]

IGNORED_LABEL = -100  # of a token that is no target

_REMEDY = (
    "Use outputs['loss']; or add callback.balance.loss() to your own loss, with the same weight, and say so with "
    "EquipoiseCallback(..., add_loss=False); or use a strategy without a loss (loss-free, quantile)."
)


class OutputLoss:
    """Two hooks of the model's forward: ``cut_packed_rows`` before it, ``add_to_output`` after it.

    They act in the forwards of a training only: the model is in training mode, and ``stop()`` was not called.

    Args:
        is_added: whether the balancing loss is added. Otherwise the model's own loss is only noted.
    """

    def __init__(self, model: nn.Module, balance: Balance, is_added: bool):
        self._balance, self._is_added, self._is_stopped = balance, is_added, False
        self._parameter_names = list(inspect.signature(model.forward).parameters)
        self._shifts_labels = shifts_labels(model)
        self._model_loss: Tensor | None = None  # the sum over the forwards since ``take_model_loss``

    def stop(self) -> None:
        self._is_stopped = True

    def take_model_loss(self) -> Tensor | None:
        """The sum of the model's own losses since the last call; None if there were none."""
        loss, self._model_loss = self._model_loss, None
        return loss

    def cut_packed_rows(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Passes the packed sequences of each row on to ``Balance``: one begins where ``position_ids`` begin anew."""
        inputs = self._by_name(args, kwargs)
        positions, mask, ids = inputs.get("position_ids"), inputs.get("attention_mask"), inputs.get("input_ids")
        if not self._is_active(model) or not isinstance(positions, Tensor) or positions.dim() != 2:
            return
        if positions.shape[0] == 1 and isinstance(ids, Tensor):
            positions = positions.expand(ids.shape[0], -1)  # models broadcast them
        token_mask = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        sequence_ids = positions - torch.arange(positions.shape[1], device=positions.device)  # constant in a sequence
        self._balance.token_mask(token_mask, sequence_ids)

    def add_to_output(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output, its loss plus the weighted balancing loss; None leaves the output as it is."""
        if not self._is_active(model):
            return None
        inputs = self._by_name(args, kwargs)
        is_dict, is_tuple = isinstance(output, dict), isinstance(output, tuple | list)
        loss = output.get("loss") if is_dict else output[0] if is_tuple and inputs.get("labels") is not None else None
        if isinstance(loss, Tensor):
            self._model_loss = loss.detach().sum() + (0.0 if self._model_loss is None else self._model_loss)
        if not self._is_added:
            return None
        if loss is None:
            _check_needs_no_loss()
            self._balance.loss()  # closes the micro-batch
            return None
        balancing_loss = self._balance.loss()
        total = loss + label_share(inputs, self._shifts_labels) * balancing_loss.to(loss.device)
        if not is_dict:
            return (total, *output[1:])
        _raise_if_dropped(balancing_loss, output.get("logits"))
        output["loss"] = total
        return output

    def _is_active(self, model: nn.Module) -> bool:
        return model.training and not self._is_stopped

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._parameter_names, args, strict=False)) | kwargs


def label_share(inputs: dict[str, Any], shifts: bool) -> Tensor | float:
    """n_m / N: the label tokens of this micro-batch over the Trainer's ``num_items_in_batch``.

    1 if the Trainer does not pass that number: it then divides by the number of micro-batches itself.

    Args:
        inputs: what the model's forward was called with, by name.
        shifts: whether the loss shifts ``labels``, so that the first one of a row is no target.
    """
    num_items, labels = inputs.get("num_items_in_batch"), inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        labels = labels[..., 1:] if shifts and isinstance(labels, Tensor) else labels
    if num_items is None or not isinstance(labels, Tensor):
        return 1.0
    num_labels = labels.ne(IGNORED_LABEL).sum()
    return num_labels / (num_items.to(num_labels.device) if isinstance(num_items, Tensor) else num_items)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the loss predicts label i + 1 at position i. The same question as the Trainer asks."""
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _check_needs_no_loss() -> None:
    """Raises ``UsageError`` if this forward, which returned no loss, will have a backward."""
    if torch.is_grad_enabled():
        raise UsageError(
            "the Trainer must take its loss from the model's output, where the balancing loss is added: this training "
            "forward got no labels and returned no loss. A compute_loss of your own keeps the labels back, or the "
            f"data has none. {_REMEDY}"
        )


def _raise_if_dropped(balancing_loss: Tensor, logits: Any) -> None:
    """Lets the backward raise ``EquipoiseError`` if it reaches the logits, but not the balancing loss.

    Autograd runs what was made last first: the hook of the balancing loss comes before the one of the logits.
    """
    if balancing_loss.requires_grad and isinstance(logits, Tensor) and logits.requires_grad:
        hook_calls: list[bool] = []
        balancing_loss.register_hook(lambda _: hook_calls.append(True))
        logits.register_hook(partial(_check_was_called, hook_calls))


def _check_was_called(hook_calls: list[bool], gradient: Tensor) -> None:
    if not hook_calls:
        raise EquipoiseError(
            "the Trainer must take its loss from the model's output, where the balancing loss was added: this backward "
            f"began without it. A compute_loss of your own that starts from outputs.logits drops it. {_REMEDY}"
        )
