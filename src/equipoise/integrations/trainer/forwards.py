"""Finds out how a Trainer's loss uses the losses that the model returns."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.balance import Balance
from equipoise.integrations.trainer.hooks import ForwardHook
from equipoise.integrations.trainer.num_items import NumItems

__all__ = ["Forward", "MarkedForwards"]


class Forward:
    """A forward with gradients whose output has a loss.

    Attributes:
        inputs: what it was called with, by name.
        divides: whether its loss is divided by ``num_items_in_batch``; known of watched forwards.
        mark: a number 0 that was added to its loss. Autograd says by it how the loss is used.
    """

    def __init__(self, inputs: dict[str, Any], divides: bool, device: torch.device):
        self.inputs, self.divides = inputs, divides
        self.mark = torch.zeros((), device=device, requires_grad=True)

    def factor_in(self, loss: Tensor) -> Tensor | None:
        """The factor that its loss has in ``loss``; None if it is not a part of it. Runs no backward of the model."""
        if not loss.requires_grad:
            return None
        ones = torch.ones_like(loss)
        (factor,) = torch.autograd.grad(loss, self.mark, ones, retain_graph=True, allow_unused=True)
        return factor


class MarkedForwards:
    """The forwards inside a call of ``compute_loss``, each with a mark in its loss.

    Args:
        model: the attached model, inside all wrappers. The forwards are those of the module that ``compute_loss`` is
            called with, wrappers included.
        is_compiled: see ``BalancedLoss``.
    """

    def __init__(self, model: nn.Module, balance: Balance, is_compiled: bool):
        self._model, self._balance, self._is_compiled = model, balance, is_compiled
        self._parameter_names = list(inspect.signature(model.forward).parameters)
        self._forwards: list[Forward] | None = None  # of the call that is under way
        self._watched: NumItems | None = None  # that compute_loss was called with
        self._num_items: NumItems | None = None  # that the forward under way was called with
        self._divides = False  # of the forward under way, if it was measured without graphs
        self._hooked: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooked, self._hooks = None, []

    @contextmanager
    def marking(self, model: nn.Module, watched: NumItems | None) -> Iterator[list[Forward]]:
        """Marks the forwards of ``model``. With ``watched`` it is measured whether their losses divide by it."""
        if self._hooked is not model:
            self.remove()
            self._hooked = model
            self._hooks = [
                model.register_forward_pre_hook(ForwardHook(self._before), with_kwargs=True),
                model.register_forward_hook(ForwardHook(self._after), with_kwargs=True),
            ]
        self._forwards, self._watched = [], watched
        try:
            yield self._forwards
        finally:
            self._forwards = self._watched = self._num_items = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._num_items, self._divides = None, False
        number = kwargs.get("num_items_in_batch")
        if self._watched is None or number is None or not torch.is_grad_enabled():
            return None
        # A number of its own: what else compute_loss does with the number says nothing about the model.
        plain = self._watched.value if number is self._watched.number else number
        num_items = NumItems(plain)
        if not self._is_compiled:
            self._num_items = num_items
            return args, {**kwargs, "num_items_in_batch": num_items.number}
        self._divides = num_items.are_used_by(
            self._loss_without_graphs(args, {**kwargs, "num_items_in_batch": num_items.number})
        )
        return args, {**kwargs, "num_items_in_batch": plain}

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output, with the mark in its loss; None leaves it as it is."""
        loss = _loss_of(output)
        if self._forwards is None or loss is None or not loss.requires_grad:
            return None
        divides = self._divides if self._num_items is None else self._num_items.are_used_by(loss)
        forward = Forward(dict(zip(self._parameter_names, args, strict=False)) | kwargs, divides, loss.device)
        self._forwards.append(forward)
        marked = loss + forward.mark
        if not isinstance(output, dict):
            return (marked, *output[1:])
        output["loss"] = marked
        return output

    def _loss_without_graphs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The loss of a forward that counts nothing and leaves the random generators as they are."""
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._balance.paused())
            stack.enter_context(_kept_generators(next(self._model.parameters()).device))
            return _loss_of(self._model.forward(*args, **kwargs))


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
