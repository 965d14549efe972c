"""Adds the balancing loss to the loss in the model's output, with the weight that the latter has."""

import inspect
from collections import deque
from contextlib import ExitStack
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
    """Two hooks of the model's forward: ``watch_num_items`` before, ``add_to_output`` after it.

    They act in the forwards of a training only: the model is in training mode, and ``stop()`` was not called.

    The Trainer passes ``num_items_in_batch`` to every model that takes it. Whether its loss divides by that number is
    measured in the first training forward: the number is part of the graph of the loss, or it is not.

    Args:
        is_added: whether the balancing loss is added. Otherwise the model's own loss is only noted.
        is_compiled: a graph hides what the loss uses, so it is measured in a forward without graphs, before the first.
    """

    def __init__(self, model: nn.Module, balance: Balance, is_added: bool, is_compiled: bool = False):
        self._balance, self._is_added, self._is_stopped = balance, is_added, False
        self._is_compiled = is_compiled
        self._num_items: _NumItems | None = None  # of the forward that is under way, if it is watched
        self._uses_num_items: bool | None = None  # whether the loss divides by it; None: not known yet
        self._parameter_names = list(inspect.signature(model.forward).parameters)
        self._shifts_labels = shifts_labels(model)
        self._model_loss: Tensor | None = None  # the sum over the forwards since ``take_model_loss``

    def stop(self) -> None:
        self._is_stopped = True

    def take_model_loss(self) -> Tensor | None:
        """The sum of the model's own losses since the last call; None if there were none."""
        loss, self._model_loss = self._model_loss, None
        return loss

    def watch_num_items(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Watches ``num_items_in_batch`` in the first training forward that gets it."""
        self._num_items, value = None, kwargs.get("num_items_in_batch")
        is_watched = self._uses_num_items is None and self._is_active(model) and torch.is_grad_enabled()
        if value is None or not is_watched:
            return None
        num_items = _NumItems(value)
        watched = {**kwargs, "num_items_in_batch": num_items.watched}
        if not self._is_compiled:
            self._num_items = num_items
            return args, watched
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._balance.paused())
            stack.enter_context(_kept_generators(next(model.parameters()).device))
            self._uses_num_items = num_items.are_used_by(_loss_of(model.forward(*args, **watched)))
        return None

    def add_to_output(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output, its loss plus the weighted balancing loss; None leaves the output as it is."""
        if not self._is_active(model):
            return None
        inputs, loss = self._by_name(args, kwargs), _loss_of(output)
        if self._num_items is not None:
            num_items, self._num_items = self._num_items, None
            inputs["num_items_in_batch"] = num_items.value
            self._uses_num_items = num_items.are_used_by(loss)
        if loss is not None:
            self._model_loss = loss.detach().sum() + (0.0 if self._model_loss is None else self._model_loss)
        if not self._is_added:
            return None
        if loss is None:
            _check_needs_no_loss()
            self._balance.loss()  # closes the micro-batch
            return None
        balancing_loss = self._balance.loss()
        share = label_share(inputs, self._shifts_labels) if self._uses_num_items else 1.0
        total = loss + share * balancing_loss.to(loss.device)
        if not isinstance(output, dict):
            return (total, *output[1:])
        _raise_if_dropped(balancing_loss, output.get("logits"))
        _raise_if_dropped(balancing_loss, output.get("log_probs"))  # of which the trainers of TRL make their losses
        output["loss"] = total
        return output

    def _is_active(self, model: nn.Module) -> bool:
        return model.training and not self._is_stopped

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._parameter_names, args, strict=False)) | kwargs


def label_share(inputs: dict[str, Any], shifts: bool) -> Tensor | float:
    """n_m / N: the label tokens of this micro-batch over ``num_items_in_batch``, for a loss that divides by N.

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


class _NumItems:
    """The number of items in a batch, and whether a loss is computed with it."""

    def __init__(self, value: Tensor | float):
        self.value = value
        number = torch.as_tensor(value)
        self._leaf = (number if number.is_floating_point() else number.float()).detach().clone().requires_grad_()
        self.watched = (self._leaf * 1).as_subclass(_Watched)  # no leaf, which could not be written into

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
        if self.watched.was_read:
            raise UsageError(
                "the loss must use num_items_in_batch as a tensor, or not at all: the model reads it as a plain number "
                "(item(), int()), so it cannot be known whether the loss divides by it and how much the balancing loss "
                "must weigh. Divide by the tensor; or set model.accepts_loss_kwargs = False, so that the Trainer does "
                "not pass it; or add callback.balance.loss() to your own loss, with the same weight, and say so with "
                "EquipoiseCallback(..., add_loss=False)."
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


def _kept_generators(device: torch.device) -> Any:
    """Sets the random generators back at the end."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def _loss_of(output: Any) -> Tensor | None:
    """The loss in the output of a model; in a tuple it comes first, and is a scalar."""
    if isinstance(output, dict):
        loss = output.get("loss")
        return loss if isinstance(loss, Tensor) else None
    first = output[0] if isinstance(output, tuple | list) and len(output) else None
    return first if isinstance(first, Tensor) and first.dim() == 0 else None


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
            "began without it. A compute_loss that starts from outputs.logits drops it. So do trainers of TRL, which "
            f"start from outputs.log_probs. {_REMEDY}"
        )
