"""equipoise: load balancing for mixture-of-experts (MoE) training in PyTorch.

Start with ``equipoise.attach``: it adds a balancing mechanism to the model you already have. Around it:

    equipoise.metrics        how even a load is, and what experts specialise in
    equipoise.nn             a router and an MoE layer for models of your own
    equipoise.integrations   callbacks for other people's training loops
    equipoise.testing        checks for your own balancers and routers

Training runs, reports and the command line are in ``equipoise_lab``: ``pip install -e '.[lab]'`` in a clone.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

_MODULE_OF = {
    "Alerts": "alerts",
    "attach": "attachment",
    "Balance": "balance",
    "Balancer": "balancers",
    "convert_coefficient": "recipes",
    "EquipoiseError": "errors",
    "Frozen": "balancers",
    "LoadBalancingLoss": "balancers",
    "LossFree": "balancers",
    "parse_strategy": "balancers",
    "Quantile": "balancers",
    "recipe": "recipes",
    "RouterAdapter": "routers",
    "RouterKind": "routers",
    "UsageError": "errors",
    "ZLoss": "balancers",
}

_SUBMODULES = ("integrations", "metrics", "nn", "testing")

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:
    from equipoise import integrations, metrics, nn, testing
    from equipoise.alerts import Alerts
    from equipoise.attachment import attach
    from equipoise.balance import Balance
    from equipoise.balancers import Balancer, Frozen, LoadBalancingLoss, LossFree, Quantile, ZLoss, parse_strategy
    from equipoise.errors import EquipoiseError, UsageError
    from equipoise.recipes import convert_coefficient, recipe
    from equipoise.routers import RouterAdapter, RouterKind
else:  # hidden from type checkers, which would otherwise accept any name

    def __getattr__(name: str) -> Any:
        """Imports a public name when it is first used, so that reading a run or asking for help does not load torch."""
        if name in _SUBMODULES:
            return importlib.import_module(f"equipoise.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
        return getattr(importlib.import_module(f"equipoise.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES, "__version__"]
