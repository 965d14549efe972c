"""Converts coefficients of other frameworks to our units. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from equipoise.errors import UsageError, suggest
from equipoise.recipes.published import LOSS_FREE

__all__ = ["FRAMEWORKS", "Framework", "convert_coefficient"]


Sizes = Mapping[str, Any]  # num_layers, k, num_experts, data_parallel; None if not given


@dataclass(frozen=True)
class Framework:
    """A framework's load-balancing loss. Ours is ``c * sum over layers of E * sum_e f_e P_e``; the defaults say so."""

    name: str
    option: str  # its name for the coefficient
    source: str = field(repr=False)
    balanced: str = field(default="1", repr=False)  # value at perfect balance, for a coefficient of 1
    layers: str = field(default="sum", repr=False)  # how layers are combined
    formula: str = "1"  # of the factor, our c / its c
    factor: Callable[[Sizes], float] = field(default=lambda sizes: 1.0, repr=False)
    needs: tuple[str, ...] = field(default=(), repr=False)  # arguments that the factor needs
    inexact: str = field(default="", repr=False)  # what the factor leaves out


_FRAMEWORKS = (
    Framework(name="equipoise", option="coefficient", source="docs/design.md"),
    Framework(
        name="megatron",
        option="--moe-aux-loss-coeff (aux_loss, seq_aux_loss)",
        inexact="f counts a new top-k without expert groups and bias (issue 2767).",
        source="megatron/core/transformer/moe/moe_utils.py, switch_load_balancing_loss_func",
    ),
    Framework(
        name="megatron-global",
        option="--moe-aux-loss-coeff (global_aux_loss)",
        balanced="1 / D",
        formula="1 / D",
        factor=lambda sizes: 1 / sizes["data_parallel"],
        needs=("data_parallel",),
        inexact="f counts the micro-batches so far, each with the same weight (issue 7213).",
        source="megatron/core/transformer/moe/router.py, _apply_global_aux_loss; NVIDIA/Megatron-LM issue 3672",
    ),
    Framework(
        name="transformers",
        option="router_aux_loss_coef",
        balanced="k",
        layers="pooled: counts and probabilities of all layers before the product",
        formula="k / L",
        factor=lambda sizes: sizes["k"] / sizes["num_layers"],
        needs=("num_layers", "k"),
        inexact="Exact if all layers have the same loads; otherwise each layer is pushed by the mean load of all. f "
        "counts a softmax top-k of the logits. Trainer may multiply the loss by the number of ranks (issue 48690).",
        source="load_balancing_loss_func in modeling_mixtral.py of Transformers 5.23; issue 31464",
    ),
    Framework(
        name="olmo-core",
        option="lb_loss_weight",
        layers="sum / L",
        formula="1 / L",
        factor=lambda sizes: 1 / sizes["num_layers"],
        needs=("num_layers",),
        inexact="L counts all layers, dense ones too. With scale_loss_by_num_layers off the factor is 1.",
        source="src/olmo_core/nn/moe/loss.py and moe.py of allenai/OLMo-core",
    ),
    Framework(
        name="megablocks",
        option="moe_loss_weight",
        layers="mean",
        formula="1 / L",
        factor=lambda sizes: 1 / sizes["num_layers"],
        needs=("num_layers",),
        source="megablocks/layers/moe.py of databricks/megablocks, batched_load_balancing_loss",
    ),
    Framework(
        name="deepspeed",
        option="the caller's factor of l_aux",
        layers="sum, by the caller",
        inexact="With k = 2, f counts each token's first choice only.",
        source="deepspeed/moe/sharded_moe.py of deepspeedai/DeepSpeed",
    ),
    Framework(
        name="maxtext",
        option="load_balance_loss_weight",
        balanced="k",
        layers="mean",
        formula="k / L",
        factor=lambda sizes: sizes["k"] / sizes["num_layers"],
        needs=("num_layers", "k"),
        inexact="Its scope is the sequence. P is the mean of softmax scores, whatever the score function. Only without "
        "gradient accumulation: with it the gradient of the loss is divided by the number of tokens.",
        source="src/maxtext/layers/moe.py, load_balance_loss, and trainers/pre_train/train.py",
    ),
    Framework(
        name="xtuner",
        option="balancing_loss_alpha",
        inexact="With a bias in the router, P is the mean of the biased scores.",
        source="xtuner/v1/loss/moe_loss.py of InternLM/xtuner",
    ),
    Framework(
        name="paper-raw",
        option="alpha, on raw sigmoid scores",
        balanced="mean of sum_j s_j",
        formula="E / 2",
        factor=lambda sizes: sizes["num_experts"] / 2,
        needs=("num_experts",),
        inexact="Its scores are not divided by their sum. The mean of sum_j s_j is E / 2 when all scores are 1/2, as "
        "at the start, and changes in training. The raw loss also lowers the scores of all experts together.",
        source=f"{LOSS_FREE}, Eq. 2",
    ),
)

FRAMEWORKS: Mapping[str, Framework] = {framework.name: framework for framework in _FRAMEWORKS}


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

        c_equipoise = factor(source) * c_source         factors: ``FRAMEWORKS``

    This holds for equal counts, a loss that is a mean over tokens and micro-batches, and gradients averaged over ranks.
    ``Framework.inexact`` says what no factor can convert.

    Args:
        coefficient: weight of the load-balancing loss in ``source``, at least 0.
        source, target: equipoise, megatron, megatron-global, transformers, olmo-core, megablocks, deepspeed, maxtext,
            xtuner or paper-raw; ``equipoise.recipes.FRAMEWORKS`` and docs/recipes.md describe each.
        num_layers: MoE layers of the model; for olmo-core all layers.
        k: experts per token.
        num_experts: routed experts per layer.
        data_parallel: data-parallel ranks; megatron-global divides by them.

    Raises ``UsageError`` for an unknown name, a coefficient that is not finite or below 0, and an argument that is
    missing or below 1.

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


def _factor(name: str, sizes: Sizes) -> float:
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
    return framework.factor(sizes)
