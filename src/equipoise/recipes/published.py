"""Published settings by name, with the source of every value. Imports no torch.

A recipe ships only if every value in it has a public source. ``WITHHELD`` says what is missing for others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from equipoise.errors import UsageError, suggest

__all__ = ["RECIPES", "WITHHELD", "Recipe", "recipe", "split_strategy"]


@dataclass(frozen=True)
class Recipe:
    """A published setting: a strategy string, and the source of each value in it.

    ``sources`` cites a paper (with equation, table or section) or an official config, for the score function and for
    every option, as ``mechanism:option``. ``notes`` says what the string cannot.
    """

    name: str
    strategy: str
    score_function: str
    summary: str = field(repr=False)
    sources: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def values(self) -> list[tuple[str, str, str]]:
        """Every setting as (key, value, source), the score function first."""
        rows = [("score_function", self.score_function, self.sources["score_function"])]
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
MESH = "groups of local tokens in mesh_tensorflow/transformer/moe.py of github.com/tensorflow/mesh"
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

SUMMED = "The source does not say how layers are combined; here they are summed."
GLOBAL_COEFFICIENT = f"{GLOBAL}, Table 4"
GLOBAL_Z = f"{GLOBAL}, section 4.1: weights as in {ST_MOE}, section 3.3"
GLOBAL_NOTES = (
    "Equation 2 calls f the fraction of tokens that are routed to an expert. We read it as the share of the "
    "assignments, which sums to 1. If it sums to k = 4 instead, the coefficient here would be four times as large.",
    SUMMED,
)

_RECIPES = (
    Recipe(
        name="switch",
        strategy="lbl:coefficient=1e-2,scope=micro_batch",
        score_function="softmax",
        summary="The load-balancing loss of Switch Transformers, per micro-batch.",
        sources={
            "score_function": f"{SWITCH}, section 2.1, Eq. 1",
            "lbl:coefficient": f"{SWITCH}, section 2.2: alpha = 1e-2, added to the loss for each layer",
            "lbl:scope": f"{SWITCH}, Eq. 4 to 6; {MESH}",
        },
        notes=("Published with one expert per token (k = 1) and a capacity that drops tokens.",),
    ),
    Recipe(
        name="st-moe",
        strategy="lbl:coefficient=1e-2,scope=micro_batch+z:coefficient=1e-3",
        score_function="softmax",
        summary="Switch's loss, and a z-loss that keeps the router's logits small.",
        sources={
            "score_function": f"{ST_MOE}, section 2",
            "lbl:coefficient": f"{ST_MOE}, Appendix A: alpha = 1e-2",
            "lbl:scope": f"{ST_MOE}, Eq. 7 to 9; {MESH}",
            "z:coefficient": f"{ST_MOE}, section 3.3, Eq. 5 and 6: c_z = 0.001",
        },
        notes=("Published with k = 2. There f counts each token's first choice only (Eq. 8), here both choices.",),
    ),
    Recipe(
        name="loss-controlled-paper",
        strategy="lbl:coefficient=1e-3,scope=sequence,normalise=false",
        score_function="sigmoid",
        summary="The baseline of the Loss-Free paper: a loss over each sequence, on raw sigmoid scores.",
        sources={
            "score_function": f"{LOSS_FREE}, section 4.1",
            "lbl:coefficient": f"{LOSS_FREE}, section 4.1: alpha = 0.001",
            "lbl:scope": f"{LOSS_FREE}, Eq. 2: over a sequence of length T",
            "lbl:normalise": f"{LOSS_FREE}, Eq. 2: P is the mean of the scores, which are not divided by their sum",
        },
        notes=(
            "On normalised scores, about 1e-3 E / 2 is as strong at the start: "
            'convert_coefficient(1e-3, "paper-raw", num_experts=E).',
            SUMMED,
        ),
    ),
    Recipe(
        name="loss-controlled-paper-softmax",
        strategy="lbl:coefficient=3e-4,scope=sequence",
        score_function="softmax",
        summary="The baseline of the Loss-Free paper on softmax scores: a loss over each sequence.",
        sources={
            "score_function": f"{LOSS_FREE}, Appendix C",
            "lbl:coefficient": f"{LOSS_FREE}, Appendix C.2 and Table 6: alpha = 0.0003",
            "lbl:scope": f"{LOSS_FREE}, Eq. 2: over a sequence of length T",
        },
        notes=(SUMMED,),
    ),
    Recipe(
        name="loss-free-paper",
        strategy="loss-free:rate=1e-3,rule=sign,center=false",
        score_function="sigmoid",
        summary="Loss-Free Balancing: a bias that moves by a fixed step against the load of the last batch.",
        sources={
            "score_function": f"{LOSS_FREE}, section 4.1",
            "loss-free:rate": f"{LOSS_FREE}, section 4.3, Figure 4: u = 0.001",
            "loss-free:rule": f"{LOSS_FREE}, Algorithm 1: the sign of mean minus count over the whole batch",
            "loss-free:center": f"{LOSS_FREE}, Algorithm 1: the step is added as it is",
        },
    ),
    Recipe(
        name="loss-free-paper-softmax",
        strategy="loss-free:rate=1e-3,rule=proportional,center=false",
        score_function="softmax",
        summary="Loss-Free Balancing for softmax scores: the step of the bias follows the size of the error.",
        sources={
            "score_function": f"{LOSS_FREE}, Appendix C",
            "loss-free:rate": f"{LOSS_FREE}, Appendix C.2: u = 1e-3",
            "loss-free:rule": f"{LOSS_FREE}, Appendix C.2: b + u e instead of b + u sign(e)",
            "loss-free:center": f"{LOSS_FREE}, Algorithm 1: the step is added as it is",
        },
        notes=("The paper does not give the unit of the error e; here it is the mean load.",),
    ),
    Recipe(
        name="micro-batch-paper",
        strategy="lbl:coefficient=8e-3,scope=micro_batch+z:coefficient=1e-3",
        score_function="softmax",
        summary="The baseline of the global-batch paper: the loss per micro-batch.",
        sources={
            "score_function": f"{GLOBAL}, section 4.1",
            "lbl:coefficient": GLOBAL_COEFFICIENT,
            "lbl:scope": f"{GLOBAL}, Eq. 3",
            "z:coefficient": GLOBAL_Z,
        },
        notes=GLOBAL_NOTES,
    ),
    Recipe(
        name="global-batch-paper",
        strategy="lbl:coefficient=8e-3,scope=global_batch+z:coefficient=1e-3",
        score_function="softmax",
        summary="The loss with loads counted over the global batch.",
        sources={
            "score_function": f"{GLOBAL}, section 4.1",
            "lbl:coefficient": GLOBAL_COEFFICIENT,
            "lbl:scope": f"{GLOBAL}, Eq. 4 to 6 and Algorithm 1",
            "z:coefficient": GLOBAL_Z,
        },
        notes=GLOBAL_NOTES,
    ),
    Recipe(
        name="global-batch-paper-43b",
        strategy="lbl:coefficient=8e-3,scope=global_batch+lbl:coefficient=8e-5,scope=micro_batch+z:coefficient=1e-3",
        score_function="softmax",
        summary="The global-batch loss and a hundredth of it per micro-batch: faster steps with expert parallelism.",
        sources={
            "score_function": f"{GLOBAL}, section 4.1",
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
        score_function="softmax",
        summary="OLMoE-1B-7B: megablocks' losses with weights 0.01 and 0.001, in our units.",
        sources={
            "score_function": "OLMoE, arXiv:2409.02060, section 2",
            "lbl:coefficient": f"moe_loss_weight 0.01 over 16 layers: {OLMOE}; mean over layers: {OLMOE_LOSS}",
            "lbl:scope": f"one micro-batch of a device: {OLMOE_LOSS}",
            "z:coefficient": f"moe_zloss_weight 0.001 over 16 layers and k = 8: {OLMOE}; both divide: {OLMOE_LOSS}",
        },
        notes=(
            "For 16 layers and k = 8. With L layers and k experts per token: lbl 0.01 / L, z 0.001 / (L k).",
            "github.com/allenai/OLMoE/issues/39 notices that the z-loss is divided by k as well.",
        ),
    ),
    Recipe(
        name="deepseek-v3",
        strategy="loss-free:rate=1e-3,rule=sign,center=false+lbl:coefficient=1e-4,scope=sequence",
        score_function="sigmoid",
        summary="Loss-Free Balancing and a weak loss against extremes within a sequence.",
        sources={
            "score_function": f"{V3}, Eq. 15",
            "loss-free:rate": f"{V3}, section 4.2: 0.001 for the first 14.3T tokens",
            "loss-free:rule": f"{V3}, section 2.1.2: gamma down if overloaded, up if underloaded, on the whole batch",
            "loss-free:center": f"{V3}, section 2.1.2: the step is added as it is",
            "lbl:coefficient": f"{V3}, section 4.2: alpha = 0.0001",
            "lbl:scope": f"{V3}, Eq. 17 to 20: sequence-wise",
        },
        notes=(
            "For the last 500B of 14.8T tokens the rate is 0. Add schedule=drop,zero_from=N to loss-free, with N at "
            "96.6 % of your steps.",
            "Eq. 18 counts the top k of the scores without the bias. Here f counts the experts really chosen.",
            SUMMED,
        ),
    ),
    Recipe(
        name="deepseek-v4",
        strategy="loss-free:rate=1e-3,rule=sign,center=false+lbl:coefficient=1e-4,scope=sequence",
        score_function="sqrt_softplus",
        summary="DeepSeek-V3's setting with the score function sqrt(softplus(x)).",
        sources={
            "score_function": f"{V4}, section 2.1",
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
        score_function="sigmoid",
        summary="Loss-Free Balancing and a weak loss against extremes within a sequence.",
        sources={
            "score_function": f"{GLM}, section 2.1",
            "loss-free:rate": f"{GLM}, section 2.4: 0.001 for the first 15T tokens",
            "loss-free:rule": f"{GLM}, section 2.1, which adopts {LOSS_FREE}, Algorithm 1",
            "loss-free:center": f"{GLM}, section 2.1, which adopts {LOSS_FREE}, Algorithm 1",
            "lbl:coefficient": f"{GLM}, section 2.4: 0.0001",
            "lbl:scope": f"{GLM}, section 2.4: sequence-level",
        },
        notes=(
            "After 15T tokens the rate is 0. Add schedule=drop,zero_from=N to loss-free.",
            "The report does not write the loss out; we read it as DeepSeek-V3's.",
            SUMMED,
        ),
    ),
    Recipe(
        name="moonlight",
        strategy="loss-free:rate=1e-3,rule=sign,center=true+lbl:coefficient=1e-4,scope=sequence",
        score_function="sigmoid",
        summary="DeepSeek-V3's setting with steps whose mean over the experts is zero.",
        sources={
            "score_function": f"{MOONLIGHT}, Appendix C, which adopts {V3}, Eq. 15",
            "loss-free:rate": f"{MOONLIGHT}, section 3.3: 1e-3 in stages 1 and 2",
            "loss-free:rule": f"{MOONLIGHT}, Appendix C: u (sign(e_i) - mean(sign(e)))",
            "loss-free:center": f"{MOONLIGHT}, Appendix C: u (sign(e_i) - mean(sign(e)))",
            "lbl:coefficient": f"1e-4: {MOONLIGHT_21}",
            "lbl:scope": f"as in DeepSeek-V3: {MOONLIGHT_21}",
        },
        notes=(
            "In the last stage, 5.2T to 5.7T tokens, the rate is 0. Add schedule=drop,zero_from=N to loss-free, with N "
            "at 91 % of your steps.",
            "The issue first says 'micro batch level', later that it is DeepSeek-V3's loss.",
            SUMMED,
        ),
    ),
    Recipe(
        name="kimi-k3",
        strategy="quantile:ema=0.0,fraction=1.0",
        score_function="sigmoid",
        summary="Quantile balancing: the bias jumps to where each expert would have had its share.",
        sources={
            "score_function": f"{K3}, section 2.3.3",
            "quantile:ema": f"{K3}, Eq. 14: the quantile of the last step (Appendix D names an average as an option)",
            "quantile:fraction": f"{K3}, Appendix D: every token of the global batch is counted",
        },
        notes=(
            "The report estimates the quantile with 1000 equal bins (Appendix D), equipoise with bins that get finer "
            "towards the present bias. The option bins is left at its default.",
        ),
    ),
)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}

WITHHELD: Mapping[str, str] = {
    "qwen3": "The report (arXiv:2505.09388, section 2) names the global-batch loss, not its weight. "
    "router_aux_loss_coef = 0.001 in the checkpoints' config belongs to another loss, that of Transformers.",
    "nemotron-3-nano": "The report (arXiv:2512.20848, section 2.4) gives a rate of 1e-3 and a loss of 1e-4, but not "
    "the scope of that loss.",
}


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises ``UsageError`` for an unknown name, with the names that are close.

    >>> recipe("switch").strategy
    'lbl:coefficient=1e-2,scope=micro_batch'
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in WITHHELD:
        raise UsageError(f"A recipe must have a source for every value: {name} is left out. {WITHHELD[name]}")
    raise UsageError(
        f"A recipe must be one of {', '.join(RECIPES)}: got {name!r}.{suggest(name, RECIPES)} `equipoise recipes` "
        "describes them."
    )
