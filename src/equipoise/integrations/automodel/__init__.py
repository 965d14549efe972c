"""Balancing in NeMo Automodel: its routers, and recipes that balance.

    recipe: equipoise.integrations.automodel.recipe.BalancedRecipe  # in the YAML file
    balance: loss-free:rate=1e-3

``balanced`` does the same to a recipe class in Python. It needs Automodel; what reads its routers does not import it.
"""

from typing import TYPE_CHECKING, Any

from equipoise.integrations.automodel.routers import ROUTER_ADAPTERS

__all__ = ["ROUTER_ADAPTERS", "balanced"]

if TYPE_CHECKING:
    from equipoise.integrations.automodel.recipe import balanced


def __getattr__(name: str) -> Any:
    if name != "balanced":
        raise AttributeError(f"module 'equipoise.integrations.automodel' has no attribute {name!r}")
    try:
        from equipoise.integrations.automodel import recipe
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("equipoise"):
            raise
        raise ImportError(f"{name} needs {error.name}, which is not installed: pip install nemo-automodel.") from error
    return recipe.balanced
