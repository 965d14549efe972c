"""Published settings by name, and what a coefficient of another framework is worth here. Imports no torch.

A recipe ships only when every value in it has a public source; ``WITHHELD`` says what is missing for others.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.errors import UsageError

__all__ = [
    "FRAMEWORKS",
    "RECIPES",
    "WITHHELD",
    "Framework",
    "Recipe",
    "convert_coefficient",
    "markdown",
    "recipe",
    "split_strategy",
    "update_page",
]


@dataclass(frozen=True)
class Recipe:
    """A published setting: a strategy string, and where each value in it stands.

    ``sources`` cites, for the gate and for every option as ``mechanism:option``, a paper (with equation, table or
    section) or an official config. ``notes`` says what the string cannot.
    """

    name: str
    strategy: str
    gate: str
    summary: str
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def values(self) -> list[tuple[str, str, str]]:
        """Every setting as (key, value, source), the gate first."""
        rows = [("gate", self.gate, self.sources["gate"])]
        for part in split_strategy(self.strategy):
            mechanism, _, options = part.partition(":")
            for option in options.split(","):
                key, _, value = option.partition("=")
                rows.append((f"{mechanism}:{key}", value, self.sources[f"{mechanism}:{key}"]))
        return rows


def split_strategy(strategy: str) -> list[str]:
    """The mechanisms of a strategy string.

    >>> split_strategy("loss-free:rate=1e+2+z:coefficient=1e-3")
    ['loss-free:rate=1e+2', 'z:coefficient=1e-3']
    """
    return re.split(r"\+(?=[A-Za-z])", strategy)


SWITCH = "Fedus et al. 2021, Switch Transformers, arXiv:2101.03961"
ST_MOE = "Zoph et al. 2022, ST-MoE, arXiv:2202.08906"
LOSS_FREE = "Wang et al. 2024, Loss-Free Balancing, arXiv:2408.15664"
GLOBAL = "Qiu et al. 2025, Demons in the Detail, arXiv:2501.11873"
OLMOE = "OLMoE, configs/olmoe-8x1b-newhp-newds-cx5-fine1-normreorder.yml in github.com/allenai/OLMoE"
OLMOE_LOSS = "megablocks/layers/moe.py, branch olmoe of github.com/Muennighoff/megablocks"
V3 = "DeepSeek-V3, arXiv:2412.19437"
V4 = "DeepSeek-V4, arXiv:2606.19348"
GLM = "GLM-4.5, arXiv:2508.06471"
MOONLIGHT = "Moonlight, arXiv:2502.16982"
MOONLIGHT_21 = "its authors in github.com/MoonshotAI/Moonlight/issues/21"
K3 = "Kimi K3, arXiv:2607.24653"

GLOBAL_COEFFICIENT = f"{GLOBAL}, Table 4"
GLOBAL_Z = f"{GLOBAL}, section 4.1: weights as in {ST_MOE}, section 3.3"
GLOBAL_NOTES = (
    "Equation 2 calls f the fraction of tokens that are routed to an expert; it is read as the share of the "
    "assignments, which sums to 1. If it sums to k = 4 instead, the coefficient here would be four times as large.",
    "How layers are combined is not said; here they are summed.",
)
SUMMED = "How layers are combined is not said; here they are summed."

_RECIPES = (
    Recipe(
        name="switch",
        strategy="lbl:coefficient=1e-2,scope=micro_batch",
        gate="softmax",
        summary="The load-balancing loss of Switch Transformers, by micro-batch.",
        sources={
            "gate": f"{SWITCH}, section 2.1, Eq. 1",
            "lbl:coefficient": f"{SWITCH}, section 2.2: alpha = 1e-2, added to the loss for each layer",
            "lbl:scope": f"{SWITCH}, Eq. 4 to 6; groups of local tokens in mesh_tensorflow/transformer/moe.py "
            "of github.com/tensorflow/mesh",
        },
        notes=("Published with one expert a token (k = 1) and a capacity that drops tokens.",),
    ),
    Recipe(
        name="st-moe",
        strategy="lbl:coefficient=1e-2,scope=micro_batch+z:coefficient=1e-3",
        gate="softmax",
        summary="Switch's loss and a z-loss that keeps the router's logits small.",
        sources={
            "gate": f"{ST_MOE}, section 2",
            "lbl:coefficient": f"{ST_MOE}, Appendix A: alpha = 1e-2",
            "lbl:scope": f"{ST_MOE}, Eq. 7 to 9; groups of local tokens in mesh_tensorflow/transformer/moe.py "
            "of github.com/tensorflow/mesh",
            "z:coefficient": f"{ST_MOE}, section 3.3, Eq. 5 and 6: c_z = 0.001",
        },
        notes=("Published with k = 2; f counts each token's first choice only (Eq. 8), here both.",),
    ),
    Recipe(
        name="loss-controlled-paper",
        strategy="lbl:coefficient=1e-3,scope=sequence,normalise=false",
        gate="sigmoid",
        summary="The baseline of the Loss-Free paper: a loss over each sequence, on raw sigmoid scores.",
        sources={
            "gate": f"{LOSS_FREE}, section 4.1",
            "lbl:coefficient": f"{LOSS_FREE}, section 4.1: alpha = 0.001",
            "lbl:scope": f"{LOSS_FREE}, Eq. 2: over a sequence of length T",
            "lbl:normalise": f"{LOSS_FREE}, Eq. 2: P is the mean of the scores, which are not divided by their sum",
        },
        notes=(
            "On normalised scores a coefficient of about 1e-3 E / 2 is as strong at the start: "
            'convert_coefficient(1e-3, "paper-raw", num_experts=E).',
            SUMMED,
        ),
    ),
    Recipe(
        name="loss-controlled-paper-softmax",
        strategy="lbl:coefficient=3e-4,scope=sequence",
        gate="softmax",
        summary="The baseline of the Loss-Free paper on a softmax gate: a loss over each sequence.",
        sources={
            "gate": f"{LOSS_FREE}, Appendix C",
            "lbl:coefficient": f"{LOSS_FREE}, Appendix C.2 and Table 6: alpha = 0.0003",
            "lbl:scope": f"{LOSS_FREE}, Eq. 2: over a sequence of length T",
        },
        notes=(SUMMED,),
    ),
    Recipe(
        name="loss-free-paper",
        strategy="loss-free:rate=1e-3,rule=sign,center=false",
        gate="sigmoid",
        summary="Loss-Free Balancing: an offset that moves by a fixed step against the load of the last batch.",
        sources={
            "gate": f"{LOSS_FREE}, section 4.1",
            "loss-free:rate": f"{LOSS_FREE}, section 4.3, Figure 4: u = 0.001",
            "loss-free:rule": f"{LOSS_FREE}, Algorithm 1: the sign of mean minus count over the whole batch",
            "loss-free:center": f"{LOSS_FREE}, Algorithm 1: the step is added as it is",
        },
    ),
    Recipe(
        name="loss-free-paper-softmax",
        strategy="loss-free:rate=1e-3,rule=proportional,center=false",
        gate="softmax",
        summary="Loss-Free Balancing for a softmax gate: the step of the offset follows the size of the error.",
        sources={
            "gate": f"{LOSS_FREE}, Appendix C",
            "loss-free:rate": f"{LOSS_FREE}, Appendix C.2: u = 1e-3",
            "loss-free:rule": f"{LOSS_FREE}, Appendix C.2: b + u e instead of b + u sign(e)",
            "loss-free:center": f"{LOSS_FREE}, Algorithm 1: the step is added as it is",
        },
        notes=("The paper does not give the unit of the error e; here it is the mean load.",),
    ),
    Recipe(
        name="micro-batch-paper",
        strategy="lbl:coefficient=8e-3,scope=micro_batch+z:coefficient=1e-3",
        gate="softmax",
        summary="The baseline of the global-batch paper: the loss by micro-batch.",
        sources={
            "gate": f"{GLOBAL}, section 4.1",
            "lbl:coefficient": GLOBAL_COEFFICIENT,
            "lbl:scope": f"{GLOBAL}, Eq. 3",
            "z:coefficient": GLOBAL_Z,
        },
        notes=GLOBAL_NOTES,
    ),
    Recipe(
        name="global-batch-paper",
        strategy="lbl:coefficient=8e-3,scope=global_batch+z:coefficient=1e-3",
        gate="softmax",
        summary="The loss with loads counted over the global batch.",
        sources={
            "gate": f"{GLOBAL}, section 4.1",
            "lbl:coefficient": GLOBAL_COEFFICIENT,
            "lbl:scope": f"{GLOBAL}, Eq. 4 to 6 and Algorithm 1",
            "z:coefficient": GLOBAL_Z,
        },
        notes=GLOBAL_NOTES,
    ),
    Recipe(
        name="global-batch-paper-43b",
        strategy="lbl:coefficient=8e-3,scope=global_batch+lbl:coefficient=8e-5,scope=micro_batch+z:coefficient=1e-3",
        gate="softmax",
        summary="The global-batch loss and a hundredth of it by micro-batch: faster steps under expert parallelism.",
        sources={
            "gate": f"{GLOBAL}, section 4.1",
            "lbl:coefficient": f"{GLOBAL}, Table 4, and 1 % of it (section 5, Table 5)",
            "lbl:scope": f"{GLOBAL}, section 5, Table 5: '128+buffer & 8'",
            "z:coefficient": GLOBAL_Z,
        },
        notes=(
            "The paper adds the micro-batch loss at step 20,000 of 60,000; here it acts from the start.",
            "The weight is printed for the 3.4B model (Table 4); section 4.1 gives one setting for all sizes.",
            *GLOBAL_NOTES,
        ),
    ),
    Recipe(
        name="olmoe",
        strategy="lbl:coefficient=6.25e-4,scope=micro_batch+z:coefficient=7.8125e-6",
        gate="softmax",
        summary="OLMoE-1B-7B: megablocks' losses with weights 0.01 and 0.001, in the units used here.",
        sources={
            "gate": "OLMoE, arXiv:2409.02060, section 2",
            "lbl:coefficient": f"moe_loss_weight 0.01 over 16 layers: {OLMOE}; mean over layers: {OLMOE_LOSS}",
            "lbl:scope": f"one micro-batch of a device: {OLMOE_LOSS}",
            "z:coefficient": f"moe_zloss_weight 0.001 over 16 layers and k = 8: {OLMOE}; both divide: {OLMOE_LOSS}",
        },
        notes=(
            "For 16 layers and k = 8. With L layers and k experts a token: lbl 0.01 / L, z 0.001 / (L k).",
            "That the z-loss is divided by k as well is noticed in github.com/allenai/OLMoE/issues/39.",
        ),
    ),
    Recipe(
        name="deepseek-v3",
        strategy="loss-free:rate=1e-3,rule=sign,center=false+lbl:coefficient=1e-4,scope=sequence",
        gate="sigmoid",
        summary="Loss-Free Balancing and a weak loss against extremes within a sequence.",
        sources={
            "gate": f"{V3}, Eq. 15",
            "loss-free:rate": f"{V3}, section 4.2: 0.001 for the first 14.3T tokens",
            "loss-free:rule": f"{V3}, section 2.1.2: gamma down if overloaded, up if underloaded, on the whole batch",
            "loss-free:center": f"{V3}, section 2.1.2: the step is added as it is",
            "lbl:coefficient": f"{V3}, section 4.2: alpha = 0.0001",
            "lbl:scope": f"{V3}, Eq. 17 to 20: sequence-wise",
        },
        notes=(
            "For the last 500B of 14.8T tokens the rate is 0. Add schedule=drop,zero_from=N to loss-free, with N at "
            "96.6 % of your steps.",
            "Eq. 18 counts the top k of the scores without the offset; here f counts the experts really used.",
            SUMMED,
        ),
    ),
    Recipe(
        name="deepseek-v4",
        strategy="loss-free:rate=1e-3,rule=sign,center=false+lbl:coefficient=1e-4,scope=sequence",
        gate="sqrt_softplus",
        summary="DeepSeek-V3's setting on the gate sqrt(softplus(x)).",
        sources={
            "gate": f"{V4}, section 2.1",
            "loss-free:rate": f"{V4}, section 4.2.2: 0.001",
            "loss-free:rule": f"{V4}, section 2.1, which adopts {V3}, section 2.1.2",
            "loss-free:center": f"{V4}, section 2.1, which adopts {V3}, section 2.1.2",
            "lbl:coefficient": f"{V4}, section 4.2.2: 0.0001",
            "lbl:scope": f"{V4}, section 2.1: sequence-wise",
        },
        notes=("The first MoE layers choose by a hash of the token and need no balancing.", SUMMED),
    ),
    Recipe(
        name="glm-4.5",
        strategy="loss-free:rate=1e-3,rule=sign,center=false+lbl:coefficient=1e-4,scope=sequence",
        gate="sigmoid",
        summary="Loss-Free Balancing and a weak loss against extremes within a sequence.",
        sources={
            "gate": f"{GLM}, section 2.1",
            "loss-free:rate": f"{GLM}, section 2.4: 0.001 for the first 15T tokens",
            "loss-free:rule": f"{GLM}, section 2.1, which adopts {LOSS_FREE}, Algorithm 1",
            "loss-free:center": f"{GLM}, section 2.1, which adopts {LOSS_FREE}, Algorithm 1",
            "lbl:coefficient": f"{GLM}, section 2.4: 0.0001",
            "lbl:scope": f"{GLM}, section 2.4: sequence-level",
        },
        notes=(
            "After 15T tokens the rate is 0. Add schedule=drop,zero_from=N to loss-free.",
            "The report does not write the loss down; it is read as DeepSeek-V3's.",
            SUMMED,
        ),
    ),
    Recipe(
        name="moonlight",
        strategy="loss-free:rate=1e-3,rule=sign,center=true+lbl:coefficient=1e-4,scope=sequence",
        gate="sigmoid",
        summary="DeepSeek-V3's setting with steps whose mean over the experts is zero.",
        sources={
            "gate": f"{MOONLIGHT}, Appendix C, which adopts {V3}, Eq. 15",
            "loss-free:rate": f"{MOONLIGHT}, section 3.3: 1e-3 in stages 1 and 2",
            "loss-free:rule": f"{MOONLIGHT}, Appendix C: u (sign(e_i) - mean(sign(e)))",
            "loss-free:center": f"{MOONLIGHT}, Appendix C: u (sign(e_i) - mean(sign(e)))",
            "lbl:coefficient": f"1e-4: {MOONLIGHT_21}",
            "lbl:scope": f"as in DeepSeek-V3: {MOONLIGHT_21}",
        },
        notes=(
            "In the last stage, 5.2T to 5.7T tokens, the rate is 0. Add schedule=drop,zero_from=N to loss-free, with N "
            "at 91 % of your steps.",
            "The issue first says 'micro batch level', then that it is DeepSeek-V3's loss.",
            SUMMED,
        ),
    ),
    Recipe(
        name="kimi-k3",
        strategy="quantile:ema=0.0,fraction=1.0",
        gate="sigmoid",
        summary="Quantile balancing: the offset jumps to where each expert would have had its share.",
        sources={
            "gate": f"{K3}, section 2.3.3",
            "quantile:ema": f"{K3}, Eq. 14: the quantile of the last step (Appendix D names an average as an option)",
            "quantile:fraction": f"{K3}, Appendix D: every token of the global batch is counted",
        },
        notes=(
            "The report estimates the quantile with 1000 equal bins (Appendix D), equipoise with bins that are finer "
            "around the present offset; bins is left at its default.",
        ),
    ),
)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}

WITHHELD: Mapping[str, str] = {
    "qwen3": "The report (arXiv:2505.09388, section 2) names the global-batch loss, not its weight. "
    "router_aux_loss_coef = 0.001 in the checkpoints' config is for the loss of Transformers, which is another.",
    "nemotron-3-nano": "The report (arXiv:2512.20848, section 2.4) gives a rate of 1e-3 and a loss of 1e-4, not the "
    "tokens over which that loss counts.",
}


def recipe(name: str) -> Recipe:
    """The recipe of this name; raises UsageError with what comes close.

    >>> recipe("switch").strategy
    'lbl:coefficient=1e-2,scope=micro_batch'
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in WITHHELD:
        raise UsageError(f"A recipe must have a source for every value: {name} is left out. {WITHHELD[name]}")
    raise UsageError(
        f"A recipe must be one of {', '.join(RECIPES)}: got {name!r}.{_close(name, RECIPES)} `equipoise recipes` says "
        "what each is."
    )


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(names), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


@dataclass(frozen=True)
class _Model:
    """What a factor may depend on."""

    num_layers: int | None
    k: int | None
    num_experts: int | None
    data_parallel: int | None


@dataclass(frozen=True)
class Framework:
    """What the load-balancing loss of a framework is, beside ``c * sum over layers of E * sum_e f_e P_e``."""

    name: str
    option: str  # what it calls the coefficient
    balanced: str  # value at perfect balance, for a coefficient of 1
    layers: str
    formula: str  # c here / c there
    factor: Callable[[_Model], float]
    needs: tuple[str, ...]  # arguments that the factor needs
    inexact: str  # what the factor leaves out
    source: str


_FRAMEWORKS = (
    Framework(
        name="equipoise",
        option="coefficient",
        balanced="1",
        layers="sum",
        formula="1",
        factor=lambda model: 1.0,
        needs=(),
        inexact="",
        source="docs/design.md",
    ),
    Framework(
        name="megatron",
        option="--moe-aux-loss-coeff (aux_loss, seq_aux_loss)",
        balanced="1",
        layers="sum",
        formula="1",
        factor=lambda model: 1.0,
        needs=(),
        inexact="f is of a new top-k without groups and offset (issue 2767).",
        source="megatron/core/transformer/moe/moe_utils.py, switch_load_balancing_loss_func",
    ),
    Framework(
        name="megatron-global",
        option="--moe-aux-loss-coeff (global_aux_loss)",
        balanced="1 / D",
        layers="sum",
        formula="1 / D",
        factor=lambda model: 1 / model.data_parallel,
        needs=("data_parallel",),
        inexact="f is of the micro-batches so far, each with the same weight (issue 7213).",
        source="megatron/core/transformer/moe/router.py, _apply_global_aux_loss; NVIDIA/Megatron-LM issue 3672",
    ),
    Framework(
        name="transformers",
        option="router_aux_loss_coef",
        balanced="k",
        layers="pooled: counts and probabilities of all layers before the product",
        formula="k / L",
        factor=lambda model: model.k / model.num_layers,
        needs=("num_layers", "k"),
        inexact="Exact where all layers have the same loads; else each layer is pushed by the mean load of all. f is "
        "of a softmax top-k of the logits. Trainer may multiply the loss by the number of ranks (issue 48690).",
        source="load_balancing_loss_func in modeling_mixtral.py of Transformers 5.23; issue 31464",
    ),
    Framework(
        name="olmo-core",
        option="lb_loss_weight",
        balanced="1",
        layers="sum / L",
        formula="1 / L",
        factor=lambda model: 1 / model.num_layers,
        needs=("num_layers",),
        inexact="L is the number of all layers, dense ones too. With scale_loss_by_num_layers off the factor is 1.",
        source="src/olmo_core/nn/moe/loss.py and moe.py of allenai/OLMo-core",
    ),
    Framework(
        name="megablocks",
        option="moe_loss_weight",
        balanced="1",
        layers="mean",
        formula="1 / L",
        factor=lambda model: 1 / model.num_layers,
        needs=("num_layers",),
        inexact="",
        source="megablocks/layers/moe.py of databricks/megablocks, batched_load_balancing_loss",
    ),
    Framework(
        name="deepspeed",
        option="the caller's factor of l_aux",
        balanced="1",
        layers="sum, by the caller",
        formula="1",
        factor=lambda model: 1.0,
        needs=(),
        inexact="With k = 2 f is of each token's first choice only.",
        source="deepspeed/moe/sharded_moe.py of deepspeedai/DeepSpeed",
    ),
    Framework(
        name="maxtext",
        option="load_balance_loss_weight",
        balanced="k",
        layers="mean",
        formula="k / L",
        factor=lambda model: model.k / model.num_layers,
        needs=("num_layers", "k"),
        inexact="Its scope is the sequence. P is of a softmax, whatever the gate. Without gradient accumulation only: "
        "with it the gradient of the loss is divided by the number of tokens.",
        source="src/maxtext/layers/moe.py, load_balance_loss, and trainers/pre_train/train.py",
    ),
    Framework(
        name="xtuner",
        option="balancing_loss_alpha",
        balanced="1",
        layers="sum",
        formula="1",
        factor=lambda model: 1.0,
        needs=(),
        inexact="With a bias in the router P is of the biased scores.",
        source="xtuner/v1/loss/moe_loss.py of InternLM/xtuner",
    ),
    Framework(
        name="paper-raw",
        option="alpha, on sigmoid scores that are not divided by their sum",
        balanced="mean of sum_j s_j",
        layers="sum",
        formula="E / 2",
        factor=lambda model: model.num_experts / 2,
        needs=("num_experts",),
        inexact="The mean of sum_j s_j is E / 2 when all scores are 1/2, as at the start, and moves in training. The "
        "raw loss also lowers the scores of all experts together.",
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
    """The coefficient with which ``target`` has the same gradient at the router's logits as ``source``.

        c_equipoise = factor(source) * c_source         factors: ``FRAMEWORKS``

    For the same counts, a loss that is a mean over tokens and micro-batches, and gradients averaged over ranks.
    ``Framework.inexact`` says what no factor can convert.

    Args:
        coefficient: weight of the load-balancing loss in ``source``, at least 0.
        source, target: equipoise, megatron, megatron-global, transformers, olmo-core, megablocks, deepspeed, maxtext,
            xtuner or paper-raw; what each means stands in ``equipoise.recipes.FRAMEWORKS`` and docs/recipes.md.
        num_layers: MoE layers of the model; olmo-core divides by all layers, so give it those.
        k: experts a token.
        num_experts: routed experts of a layer.
        data_parallel: data-parallel ranks; megatron-global divides by them.

    Errors: UsageError for an unknown name, a coefficient that is no finite number from 0, and an argument that is
    missing or below 1.

    >>> convert_coefficient(1e-3, "transformers", num_layers=16, k=8)
    0.0005
    """
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not math.isfinite(coefficient):
        raise UsageError(f"coefficient must be a finite number: got {coefficient!r}.")
    if coefficient < 0:
        raise UsageError(f"coefficient must be at least 0: got {coefficient!r}.")
    given = {"num_layers": num_layers, "k": k, "num_experts": num_experts, "data_parallel": data_parallel}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be a whole number from 1: got {value!r}.")
    if k is not None and num_experts is not None and k > num_experts:
        raise UsageError(f"k must be at most num_experts: got {k} of {num_experts}.")
    model = _Model(**given)
    return coefficient * _factor(source, model) / _factor(target, model)


def _factor(name: str, model: _Model) -> float:
    if name not in FRAMEWORKS:
        raise UsageError(
            f"A framework must be one of {', '.join(FRAMEWORKS)}: got {name!r}.{_close(name, FRAMEWORKS)} If its loss "
            "is 1 at perfect balance and summed over layers, its coefficient is the same as here."
        )
    framework = FRAMEWORKS[name]
    missing = [need for need in framework.needs if getattr(model, need) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} must be given to convert a coefficient of {name} (factor {framework.formula}): "
            f"got none. Write {', '.join(f'{need}=...' for need in missing)}."
        )
    return framework.factor(model)


def markdown() -> dict[str, str]:
    """The generated parts of docs/recipes.md, by the name of their marker."""
    return {
        "recipes": _table(
            ("name", "gate", "strategy", ""),
            [(f"[`{r.name}`](#{_anchor(r.name)})", r.gate, f"`{r.strategy}`", r.summary) for r in RECIPES.values()],
        ),
        "sources": "\n\n".join(_section(recipe) for recipe in RECIPES.values()),
        "withheld": _table(("name", "what is missing"), [(f"`{name}`", why) for name, why in WITHHELD.items()]),
        "frameworks": _table(
            ("name", "its coefficient", "value at balance", "layers", "factor", "what the factor leaves out", "source"),
            [(f"`{f.name}`", f.option, f.balanced, f.layers, f.formula, f.inexact, f.source) for f in _FRAMEWORKS],
        ),
    }


def _section(recipe: Recipe) -> str:
    rows = [(f"`{key}`", value, source) for key, value, source in recipe.values()]
    notes = "".join(f"\n- {note}" for note in recipe.notes)
    text = f"### {recipe.name}\n\n{recipe.summary}\n\n```\n{recipe.strategy}\n```\n\n"
    return text + _table(("", "value", "source"), rows) + (f"\n{notes}" if notes else "")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _anchor(title: str) -> str:
    return title.replace(".", "")


def update_page(text: str) -> str:
    """The text of docs/recipes.md with the parts between its markers generated anew."""
    for name, part in markdown().items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise UsageError(f"The page must hold {start} and {end} once each: put the markers back.")
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{part}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    page.write_text(update_page(page.read_text(encoding="utf-8")), encoding="utf-8")
