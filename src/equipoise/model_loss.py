"""Notices a load-balancing loss that the model has of its own: it would act beside ours.

Models of Transformers add one where ``output_router_logits`` is set, in the config or in a call, and its coefficient is
not 0. Each family keeps that coefficient elsewhere: in the model, which copied it from the config, or in the text
config. A trainer may also take the loss from the output and weigh it itself. So what counts is the gradient of the loss
in the output. A compiled graph hides it: there the loss in the output and the coefficient must do.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.torch_internals import is_traced, outside_graphs, runs_while_traced

__all__ = ["REMEDY", "model_loss_in_config", "warn_of_model_loss", "warn_of_router_losses", "watch_model_loss"]

REMEDY = (
    "To have only one, set model.config.get_text_config().output_router_logits = False and call the model without "
    "output_router_logits=True. Where a trainer passes that, set its coefficient to 0 (TRL: router_aux_loss_coef=0.0)."
)
_OUTPUTS = ("aux_loss", "encoder_aux_loss", "decoder_aux_loss")
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_log = logging.getLogger("equipoise")


def warn_of_model_loss(model: nn.Module) -> list[RemovableHandle]:
    """Warns once if the model has such a loss: at once if its config says so, or else when the loss acts."""
    cause = model_loss_in_config(model)
    if cause is None:
        return watch_model_loss(model, _warn)
    _warn(cause)
    return []


def _warn(cause: str) -> None:
    _log.warning(
        f"attach: the model adds a load-balancing loss of its own ({cause}), which acts beside what was attached. "
        f"{REMEDY}"
    )


def model_loss_in_config(model: nn.Module) -> str | None:
    """What in a config switches the model's own loss on; None if nothing does."""
    for head in _heads(model):
        name, coefficient = _coefficient(head)
        if coefficient and getattr(_text_config(head), "output_router_logits", False):
            return f"output_router_logits with {name}={coefficient:g}"
    return None


def watch_model_loss(
    model: nn.Module, report: Callable[[str], None], as_hook: Callable[[Any], Any] = lambda watch: watch, **options: Any
) -> list[RemovableHandle]:
    """Calls ``report(cause)`` once if a forward returns a load-balancing loss that has a gradient other than 0.

    The hooks are removed after the first forward that returns one that is differentiated.

    Args:
        as_hook: makes the hook of the forward from what is called with its output.
        options: of ``register_forward_hook``.
    """
    watch = _Watch(report)
    for module in dict.fromkeys([model, *_heads(model)]):
        watch.handles.append(module.register_forward_hook(as_hook(watch), with_kwargs=True, **options))
    return watch.handles


def warn_of_router_losses(
    own_loss: Mapping[nn.Module, Callable[[Any], Tensor | None]], framework: str
) -> list[RemovableHandle]:
    """Warns once if a balancing loss that a router returns has a gradient other than 0, as where a block adds it.

    The hook of a router is removed after its first forward that returns a loss with a graph.

    Args:
        own_loss: by router, what reads the loss from the output of its forward.
        framework: of the routers.

    Returns:
        The handles of the hooks, one for each router.
    """
    watch = _RouterWatch(own_loss, framework)
    watch.by_router = {router: router.register_forward_hook(watch, with_kwargs=True) for router in own_loss}
    return list(watch.by_router.values())


class _Watch:
    """Looks for the loss in the output of a forward. A copy or a pickle of it does nothing."""

    def __init__(self, report: Callable[[str], None] | None = None):
        self.report = report
        self.handles: list[RemovableHandle] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        read = output.get if isinstance(output, dict) else partial(getattr, output)
        values = [read(name, None) for name in _OUTPUTS]
        losses = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        # A tuple does not say which of its tensors is that loss.
        is_asked_for = bool(kwargs.get("output_router_logits")) and isinstance(output, tuple)
        if (losses and is_traced()) or is_asked_for:
            self._judge_by_coefficient(module)
        elif losses:
            for loss in losses:
                loss.register_hook(self._judge_by_gradient)
            self._stop()

    @runs_while_traced
    def _judge_by_coefficient(self, module: nn.Module) -> None:
        name, coefficient = _coefficient(module)
        if coefficient != 0:
            weight = "an unknown coefficient" if coefficient is None else f"{name}={coefficient:g}"
            self._say(f"the forward returns one, with {weight}")

    @outside_graphs  # compiled autograd would trace it
    def _judge_by_gradient(self, gradient: Tensor) -> None:
        if self.report is not None and gradient.any():
            self._say("the one that its forward returns has a gradient")

    def _say(self, cause: str) -> None:
        report, self.report = self.report, None
        if report is not None:
            report(cause)

    def _stop(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watch, ()


class _RouterWatch(_Watch):
    """Looks for the loss in the output of a router. A copy or a pickle of it does nothing."""

    def __init__(self, own_loss: Mapping[nn.Module, Callable[[Any], Tensor | None]], framework: str):
        super().__init__(self._warn)
        self.own_loss, self.framework = own_loss, framework
        self.by_router: dict[nn.Module, RemovableHandle] = {}

    @outside_graphs  # inside a graph it could not hook the loss
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss = self.own_loss[module](output) if torch.is_grad_enabled() and not is_traced() else None
        if loss is not None and loss.requires_grad:
            loss.register_hook(self._judge_by_gradient)
            self.by_router.pop(module).remove()

    def _warn(self, cause: str) -> None:
        _log.warning(
            f"attach: the load-balancing loss that the routers of {self.framework} return has a gradient, so it is in "
            "the training loss. It acts beside what was attached. To have only one, leave it out of the loss."
        )


# ---- what Transformers calls things ----


def _heads(model: nn.Module) -> list[nn.Module]:
    """The modules that compute a loss, and know whether a load-balancing loss belongs to it."""
    return [module for module in model.modules() if _computes_loss(type(module).forward)]


@cache
def _computes_loss(forward: Any) -> bool:
    return {"labels", "output_router_logits"} <= inspect.signature(forward).parameters.keys()


def _coefficient(head: nn.Module) -> tuple[str, float | None]:
    """The name and the value of the coefficient that the forward of ``head`` uses; None if it is not known."""
    for place in (head, _text_config(head)):
        for name in _COEFFICIENTS:
            value = getattr(place, name, None)
            if isinstance(value, int | float):
                return name, value
    return "", None


def _text_config(head: nn.Module) -> Any:
    config = getattr(head, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else getattr(config, "text_config", config)
