"""Converts coefficients of other frameworks to our units. The data is in ``frameworks.toml``. Imports no torch."""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files

from equipoise.errors import UsageError, suggest

__all__ = ["FRAMEWORKS", "Framework", "convert_coefficient"]


@dataclass(frozen=True)
class Framework:
    """A framework's load-balancing loss. Ours is ``c * sum over layers of E * sum_e f_e P_e``; the defaults say so.

    Attributes:
        name: the name that ``convert_coefficient`` knows.
        option: the framework's name for the coefficient.
        source: where the loss is defined.
        balanced: its value at perfect balance, for a coefficient of 1.
        layers: how layers are combined.
        formula: of the factor, our coefficient over the framework's.
        inexact: what the factor leaves out.
    """

    name: str
    option: str  # its name for the coefficient
    source: str = field(repr=False)
    balanced: str = field(default="1", repr=False)  # value at perfect balance, for a coefficient of 1
    layers: str = field(default="sum", repr=False)  # how layers are combined
    formula: str = "1"  # of the factor, our c / its c; a key of FACTORS
    inexact: str = field(default="", repr=False)  # what the factor leaves out

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments of ``convert_coefficient`` that the factor needs."""
        return FACTORS[self.formula][0]


# By formula: what it needs, and the factor of these numbers. L layers, k and E experts, D data-parallel ranks.
FACTORS: Mapping[str, tuple[tuple[str, ...], Callable[..., float]]] = {
    "1": ((), lambda: 1.0),
    "1 / D": (("data_parallel",), lambda ranks: 1 / ranks),
    "1 / L": (("num_layers",), lambda layers: 1 / layers),
    "k / L": (("num_layers", "k"), lambda layers, k: k / layers),
    "E / 2": (("num_experts",), lambda experts: experts / 2),
}

_DATA = tomllib.loads((files("equipoise.recipes") / "frameworks.toml").read_text(encoding="utf-8"))

FRAMEWORKS: Mapping[str, Framework] = {name: Framework(name, **fields) for name, fields in _DATA.items()}
"""The frameworks that ``convert_coefficient`` knows, by name."""


def convert_coefficient(
    coefficient: float,
    source: str,
    target: str = "equipoise",
    *,
    num_layers: int | None = None,
    k: int | None = None,
    num_experts: int | None = None,
    data_parallel: int | None = None,
) -> float:
    """The coefficient that gives ``target`` the same gradient at the router's logits as ``source``.

        c_equipoise = factor(source) * c_source         factors: FRAMEWORKS

    This holds for equal counts, a loss that is a mean over tokens and micro-batches, and gradients averaged over ranks.
    ``Framework.inexact`` says what no factor can convert.

    Args:
        coefficient: weight of the load-balancing loss in ``source``, at least 0.
        source: equipoise, megatron, megatron-global, transformers, olmo-core, megablocks, deepspeed, maxtext, xtuner or
            paper-raw; ``equipoise.recipes.FRAMEWORKS`` and docs/reference/recipes.md describe each.
        target: likewise.
        num_layers: MoE layers of the model; for olmo-core all layers.
        k: experts per token.
        num_experts: routed experts per layer.
        data_parallel: data-parallel ranks; megatron-global divides by them.

    Raises:
        UsageError: an unknown name, a coefficient that is not finite or below 0, or an argument that is missing or
            below 1.

    Examples:
        >>> convert_coefficient(1e-3, "transformers", num_layers=16, k=8)
        0.0005
    """
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not math.isfinite(coefficient):
        raise UsageError(f"coefficient must be a finite number: got {coefficient!r}.")
    if coefficient < 0:
        raise UsageError(f"coefficient must be at least 0: got {coefficient!r}.")
    sizes = {"num_layers": num_layers, "k": k, "num_experts": num_experts, "data_parallel": data_parallel}
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be a whole number from 1: got {value!r}.")
    if k is not None and num_experts is not None and k > num_experts:
        raise UsageError(f"k must be at most num_experts: got {k} of {num_experts}.")
    return coefficient * _factor(source, sizes) / _factor(target, sizes)


def _factor(name: str, sizes: Mapping[str, int | None]) -> float:
    if name not in FRAMEWORKS:
        raise UsageError(
            f"A framework must be one of {', '.join(FRAMEWORKS)}: got {name!r}.{suggest(name, FRAMEWORKS)} If its loss "
            "is 1 at perfect balance and summed over layers, keep its coefficient."
        )
    framework = FRAMEWORKS[name]
    missing = [need for need in framework.needs if sizes[need] is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} must be given to convert a coefficient of {name} (factor {framework.formula}): "
            f"got none. Write {', '.join(f'{need}=...' for need in missing)}."
        )
    return FACTORS[framework.formula][1](*(sizes[need] for need in framework.needs))
