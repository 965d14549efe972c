"""Balancing in NeMo Automodel: its routers, and recipes that balance.

    recipe: equipoise.integrations.automodel.recipe.BalancedRecipe  # in the YAML file
    balance: loss-free:rate=1e-3

``balanced`` does the same to a recipe class in Python. It needs Automodel; what reads its routers does not import it.
"""

from typing import TYPE_CHECKING, Any

from equipoise.integrations.automodel.routers import ROUTER_ADAPTERS
from equipoise.integrations.framework_import import explained

__all__ = ["ROUTER_ADAPTERS", "balanced"]

if TYPE_CHECKING:
    from equipoise.integrations.automodel.recipe import balanced


def __getattr__(name: str) -> Any:
    if name != "balanced":
        raise AttributeError(f"module 'equipoise.integrations.automodel' has no attribute {name!r}")
    with explained(name, "nemo_automodel", "nemo-automodel", "0.7"):
        from equipoise.integrations.automodel import recipe
    return recipe.balanced
