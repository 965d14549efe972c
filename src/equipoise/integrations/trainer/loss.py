"""Adds the balancing loss to the loss of a Trainer, with the weight that the latter has."""

from typing import Any

import torch
from torch import Tensor, nn

from equipoise.balance import Balance
from equipoise.integrations.trainer.forwards import Forward, MarkedForwards
from equipoise.integrations.trainer.num_items import NumItems, label_share, loss_shifts_labels

__all__ = ["BalancedLoss"]


class BalancedLoss:
    """Stands in for ``trainer.compute_loss`` while it trains: calls it, and adds the balancing loss to what it returns.

    All forwards with gradients of one call are one micro-batch. Its balancing loss weighs as the Trainer's loss does.
    Let n be the label tokens of the micro-batch, N the number of items that the Trainer passes.

    - ``compute_loss`` may multiply the loss in the model's output, for example by the number of ranks. Autograd
      measures that factor, and the balancing loss is multiplied by it; by n / N too, if the model divides by N.
    - Otherwise the Trainer's loss is made from logits or log-probabilities. If it divides by N, the factor is n / N
      times the number of ranks, as Trainers multiply if N is of all ranks. If not, it is a mean over the micro-batch.
      Then the factor is 1, and the Trainer divides by the number of micro-batches. With ``loss_is_scaled_for_ga`` it
      has divided already: the factor is 1 / micro-batches.

    Whether a loss divides by N is measured in the first call that gets N: there N has a gradient.

    Args:
        trainer: its attribute ``compute_loss`` is replaced by this, until ``remove``.
        model: the attached model, inside all wrappers.
        is_added: whether the balancing loss is added. Otherwise the Trainer's loss is only noted.
        is_compiled: a graph hides what the model's loss uses, so that is measured in a forward without graphs.
    """

    def __init__(self, trainer: Any, model: nn.Module, balance: Balance, is_added: bool, is_compiled: bool = False):
        self._trainer, self._balance, self._is_added = trainer, balance, is_added
        self._forwards = MarkedForwards(model, balance, is_compiled)
        self._shifts_labels = loss_shifts_labels(model)
        self._divides: bool | None = None  # whether the loss divides by N; None: not known yet
        self._loss: Tensor | None = None  # the sum over the calls since ``take_loss``
        self._replaced = vars(trainer).get("compute_loss")  # what somebody else has put on this instance
        self._compute_loss = trainer.compute_loss
        trainer.compute_loss = self

    def remove(self) -> None:
        """Gives the Trainer back what it had."""
        self._is_added = False
        self._forwards.remove()
        if vars(self._trainer).get("compute_loss") is not self:
            return  # removed already; or wrapped by somebody else since, who goes on calling this one
        del self._trainer.compute_loss
        if self._replaced is not None:
            self._trainer.compute_loss = self._replaced

    def take_loss(self) -> Tensor | None:
        """The sum of the Trainer's losses since the last call, without the balancing loss; None if there were none."""
        loss, self._loss = self._loss, None
        return loss

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        options: dict[str, Any] = {"return_outputs": True} if return_outputs else {}
        if num_items_in_batch is not None:
            options["num_items_in_batch"] = num_items_in_batch
        if not (model.training and torch.is_grad_enabled()):
            return self._compute_loss(model, inputs, **options)
        if not self._is_added:
            result = self._compute_loss(model, inputs, **options)
            self._note(_loss_in(result))
            return result
        labels: dict[str, Any] = {name: inputs[name] for name in ("labels", "shift_labels") if name in inputs}
        watched = None
        if self._divides is None and num_items_in_batch is not None:
            watched = NumItems(num_items_in_batch)
            options["num_items_in_batch"] = watched.number
        with self._forwards.marking(model, watched) as forwards:
            result = self._compute_loss(model, inputs, **options)
        loss = _loss_in(result)
        self._note(loss)
        factor = self._factor(loss, forwards, labels, num_items_in_batch, watched)
        total = loss + factor * self._balance.loss().to(loss.device)
        return (total, *result[1:]) if isinstance(result, tuple) else total

    def _note(self, loss: Tensor) -> None:
        self._loss = loss.detach().sum() + (0.0 if self._loss is None else self._loss)

    def _factor(
        self, loss: Tensor, forwards: list[Forward], labels: dict[str, Any], num_items: Any, watched: NumItems | None
    ) -> Tensor | float:
        """What the balancing loss is multiplied by, before it is added to ``loss``."""
        parts = [(forward, part) for forward in forwards if (part := forward.factor_in(loss)) is not None]
        if watched is not None:
            self._divides = parts[0][0].divides if parts else watched.are_used_by(loss)
        if parts:
            return torch.stack([part * self._share(forward.inputs, num_items) for forward, part in parts]).sum()
        if num_items is not None and (self._divides or self._trainer.compute_loss_func is not None):
            return self._share(labels, num_items) * self._num_ranks()
        is_scaled = bool(getattr(self._trainer, "loss_is_scaled_for_ga", None))
        return 1 / self._trainer.current_gradient_accumulation_steps if is_scaled else 1.0

    def _share(self, inputs: dict[str, Any], num_items: Any) -> Tensor | float:
        """n / N for a loss that divides by N, 1 for one that does not."""
        return label_share(inputs, num_items, self._shifts_labels) if self._divides else 1.0

    def _num_ranks(self) -> int:
        """The factor that undoes DDP's average, for a loss that was divided by the items of all ranks."""
        if not self._trainer.args.average_tokens_across_devices:
            return 1
        return int(self._trainer.accelerator.num_processes // self._trainer.get_tp_size())


def _loss_in(result: Any) -> Tensor:
    """The loss in what ``compute_loss`` returned."""
    return result[0] if isinstance(result, tuple) else result
