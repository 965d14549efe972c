"""Published settings by name, and coefficients of other frameworks in our units. Imports no torch."""

from equipoise.recipes.convert import FRAMEWORKS, Framework, convert_coefficient
from equipoise.recipes.published import RECIPES, WITHHELD, Recipe, recipe, split_strategy

__all__ = [
    "FRAMEWORKS",
    "RECIPES",
    "WITHHELD",
    "Framework",
    "Recipe",
    "convert_coefficient",
    "recipe",
    "split_strategy",
]
