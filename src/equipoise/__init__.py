"""equipoise: load balancing for mixture-of-experts training in PyTorch.

Attach it to the model you already have, choose a mechanism and a scope, and trust the counts. ``attach`` is the door;
``equipoise.nn`` has a router and a layer for models of your own, ``equipoise.testing`` checks balancers and models,
``equipoise.integrations`` has the callback for ``transformers.Trainer``, ``equipoise.analysis`` reads what runs left,
compares and draws it.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Alerts": "alerts",
    "Balance": "balance",
    "Balancer": "balancers",
    "EquipoiseError": "errors",
    "Frozen": "balancers",
    "LoadBalancingLoss": "balancers",
    "LossFree": "balancers",
    "Quantile": "balancers",
    "RouterKind": "taps.tap",
    "Routing": "routing",
    "UsageError": "errors",
    "ZLoss": "balancers",
    "attach": "attachment",
    "coefficient_of_variation": "metrics",
    "convert_coefficient": "recipes",
    "dead_experts": "metrics",
    "domain_information": "metrics",
    "drop_rate": "metrics",
    "effective_experts": "metrics",
    "expert_load": "load",
    "gini": "metrics",
    "load_balancing_loss": "balancers",
    "load_entropy": "metrics",
    "max_domain_share": "metrics",
    "max_violation": "metrics",
    "min_violation": "metrics",
    "parse_strategy": "balancers",
    "quantile_offset": "balancers",
    "recipe": "recipes",
    "route": "routing",
    "sampling_floor": "metrics",
    "score": "routing",
    "sequence_load": "load",
    "sequence_load_balancing_loss": "balancers",
    "z_loss": "balancers",
}

_MODULES = ("analysis", "integrations", "nn", "testing")

__all__ = sorted(_HOME, key=str.casefold)

if TYPE_CHECKING:
    from equipoise.alerts import Alerts
    from equipoise.attachment import attach
    from equipoise.balance import Balance
    from equipoise.balancers import (
        Balancer,
        Frozen,
        LoadBalancingLoss,
        LossFree,
        Quantile,
        ZLoss,
        load_balancing_loss,
        parse_strategy,
        quantile_offset,
        sequence_load_balancing_loss,
        z_loss,
    )
    from equipoise.errors import EquipoiseError, UsageError
    from equipoise.load import expert_load, sequence_load
    from equipoise.metrics import (
        coefficient_of_variation,
        dead_experts,
        domain_information,
        drop_rate,
        effective_experts,
        gini,
        load_entropy,
        max_domain_share,
        max_violation,
        min_violation,
        sampling_floor,
    )
    from equipoise.recipes import convert_coefficient, recipe
    from equipoise.routing import Routing, route, score
    from equipoise.taps.tap import RouterKind


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"equipoise.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(importlib.import_module(f"equipoise.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
