"""Attaches the model of a Trainer: biases stay fixed if no router is trained."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from equipoise.attachment import attach, resolve
from equipoise.balance import Balance
from equipoise.balancers import Balancer, Frozen
from equipoise.errors import UsageError

__all__ = ["attach_for_training"]

_log = logging.getLogger("equipoise")


def attach_for_training(
    model: nn.Module, strategy: Sequence[Balancer | str], arguments: Mapping[str, Any], move_frozen: bool
) -> Balance:
    """``attach(model, *strategy, **arguments)``, with fixed biases if no router is trained.

    With ``move_frozen`` biases move in any case. Raises ``UsageError`` if multiplicative biases would stay fixed.
    """
    balancers = resolve(strategy)
    balance = attach(model, *strategy, **arguments)
    routers = [layer.router for layer in balance.layers]
    moves_biases = any(balancer.has_bias and not isinstance(balancer, Frozen) for balancer in balancers)
    if move_frozen or not moves_biases or not routers or any(_is_trained(router, model) for router in routers):
        return balance
    balance.detach()
    if any(balancer.multiplies for balancer in balancers):
        raise UsageError(
            "multiplicative biases must move: no router of the model is trained, so they would stay fixed. Pass "
            "move_frozen=True, or choose a rule that adds."
        )
    _log.warning(
        "EquipoiseCallback: no router of the model is trained, so the biases stay fixed. move_frozen=True moves them; "
        "they are then saved beside the adapters."
    )
    return attach(model, *(Frozen() if balancer.has_bias else balancer for balancer in balancers), **arguments)


def _is_trained(router: nn.Module, model: nn.Module) -> bool:
    """Whether the router, or an adapter of PEFT around it, has a trainable parameter."""
    for module in model.modules():
        innermost = module
        while isinstance(innermost._modules.get("base_layer"), nn.Module):
            innermost = innermost.get_submodule("base_layer")
        if innermost is router and any(parameter.requires_grad for parameter in module.parameters()):
            return True
    return False
