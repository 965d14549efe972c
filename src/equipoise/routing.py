"""How a router decides: hidden -> logits -> scores -> choice, as plain functions of tensors.

The bias of a loss-free balancer enters at one place only, the choice. The weights are always the plain scores.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.torch_internals import softmax_backward

__all__ = [
    "SCORE_FUNCTIONS",
    "Routing",
    "ScoreFunction",
    "Selection",
    "route",
    "score",
    "score_backward",
    "widest_float",
    "without_autocast",
]

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]
Selection = Literal["scores", "logits"]  # the values that a router adds its bias to and chooses by
TokensExperts = Float[Tensor, "tokens experts"]
SCORE_FUNCTIONS: tuple[ScoreFunction, ...] = get_args(ScoreFunction)


class Routing(NamedTuple):
    """What one router call decided. Loads, losses and balancers read this and nothing else.

    Attributes:
        logits: of the router, ``[tokens, experts]``.
        scores: of the logits, float32 or wider, before any bias.
        expert_ids: the choice, ``[tokens, k]``.
        weights: the weights of the chosen experts' outputs, ``[tokens, k]``, taken from the scores.
        mask: 1 for a token that counts, 0 for padding; None: every token counts.
        sequence_ids: which sequence (0, 1, ...) a token belongs to; None: unknown.
        num_sequences: an upper bound of their number that is known without reading the data.
    """

    logits: Float[Tensor, "tokens experts"]  # the router's logits
    scores: Float[Tensor, "tokens experts"]  # float32 or wider, before any bias
    expert_ids: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]  # combine weights, taken from the scores
    mask: Float[Tensor, " tokens"] | None = None  # 1 for a token that counts, 0 for padding; None: every token counts
    sequence_ids: Int[Tensor, " tokens"] | None = None  # which sequence, 0, 1, ..., a token belongs to; None: unknown
    num_sequences: int = 0  # an upper bound that is known without reading the data

    def __repr__(self) -> str:
        (tokens, experts), k = self.scores.shape, self.expert_ids.shape[-1]
        is_masked = self.mask is not None
        return f"Routing({tokens=}, {experts=}, {k=}, {is_masked=}, num_sequences={self.num_sequences})"


DEVICES_WITHOUT_FLOAT64 = {"mps"}


def widest_float(device: torch.device | None) -> torch.dtype:
    """The dtype of sums and means: float64, or float32 on a device that has no wider one."""
    lacks_float64 = device is not None and device.type in DEVICES_WITHOUT_FLOAT64
    return torch.float32 if lacks_float64 else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off on this device, so that a product keeps the dtype of its operands."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def check_two_dimensions(logits: Tensor) -> None:
    if logits.dim() != 2:
        shape = tuple(logits.shape)
        raise ValueError(f"logits must have the shape (tokens, experts): got {shape}. Flatten batch and sequence.")


def check_mask(mask: Tensor | None, num_tokens: int) -> None:
    if mask is not None and mask.shape != (num_tokens,):
        shape = tuple(mask.shape)
        raise ValueError(f"mask must hold one number per token: expected shape ({num_tokens},), got {shape}.")


def score(logits: TokensExperts, score_function: ScoreFunction = "softmax") -> TokensExperts:
    """The router's scores, in float32 or wider.

        softmax         s_e = exp(z_e) / sum_j exp(z_j)
        sigmoid         s_e = 1 / (1 + exp(-z_e))       DeepSeek-V3, arXiv:2412.19437
        sqrt_softplus   s_e = sqrt(log(1 + exp(z_e)))   DeepSeek-V4, arXiv:2606.19348

    In float32, exp(z) underflows below z = -88. There sigmoid scores are 0, sqrt_softplus scores are all the same, and
    neither has a slope. A token whose logits all lie there trains no router, and no balancing loss sees it.

    Args:
        logits: floating point.
        score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus``.

    Raises:
        ValueError: an unknown score function, or logits that are not floating point.

    Examples:
        >>> score(torch.tensor([[0.0, 0.0]]), "sigmoid")
        tensor([[0.5000, 0.5000]])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must be a tensor of floating point numbers: got {kind}.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_function == "softmax":
        return logits.softmax(-1)
    if score_function == "sigmoid":
        return logits.sigmoid()
    if score_function == "sqrt_softplus":
        # below z = -104 softplus is 0 in float32, where sqrt has an infinite slope
        return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    raise ValueError(f"score_function must be one of {', '.join(SCORE_FUNCTIONS)}: got {score_function!r}.")


def score_backward(
    gradient: TokensExperts, logits: TokensExperts, scores: TokensExperts, score_function: ScoreFunction
) -> TokensExperts:
    """The gradient at the logits, in their dtype, from ``gradient`` at ``scores = score(logits, score_function)``."""
    if score_function == "softmax":
        logit_gradient = softmax_backward(gradient, scores)
    elif score_function == "sigmoid":
        logit_gradient = torch.ops.aten.sigmoid_backward(gradient, scores)
    else:
        logit_gradient = gradient * logits.to(scores.dtype).sigmoid() / (2 * scores)
        smallest = torch.finfo(scores.dtype).tiny ** 0.5
        logit_gradient = logit_gradient.masked_fill(scores <= smallest, 0)  # where score() clamps softplus
    return logit_gradient.to(logits.dtype)


def _mask_expert_groups(choice: TokensExperts, num_groups: int, top_groups: int) -> TokensExperts:
    grouped = choice.unflatten(-1, (num_groups, -1))  # (tokens, expert groups, experts per group)
    value = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    is_open = torch.zeros_like(value, dtype=torch.bool).scatter_(-1, value.topk(top_groups, dim=-1).indices, True)
    # -inf, not 0: against negative biased scores an expert of a masked group would win with 0
    return grouped.masked_fill(~is_open.unsqueeze(-1), float("-inf")).flatten(-2)


def route(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    *,
    score_function: ScoreFunction = "softmax",
    bias: Float[Tensor, " experts"] | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalise: bool = False,
    scale: float = 1.0,
    mask: Float[Tensor, " tokens"] | None = None,
) -> Routing:
    """Chooses k experts per token.

        chosen  = top-k of (score + bias), within the best expert groups if there are any
        weights = scale * score[chosen]   (/ their sum if renormalise)

    The value of an expert group is the sum of its two highest biased scores; the ``top_groups`` best ones are open. The
    bias changes the choice, never the weights.

    Args:
        logits: of the router, floating point.
        k: from 1 to the number of experts in the groups that may be chosen.
        score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus``; see ``score``.
        bias: float32, in the units of the scores.
        num_groups: expert groups of equal size; 1 switches group-limited routing off.
        top_groups: how many of them are open to a token.
        renormalise: divide the weights by their sum over the chosen experts.
        scale: factor on the weights, finite and positive; DeepSeek's routed scaling factor.
        mask: 1 for a token that counts, 0 for padding; stored in the result, no effect on the choice.

    Raises:
        ValueError: sizes that do not fit, or logits that are not floating point.

    Source: Wang et al. 2024, arXiv:2408.15664, Eq. 3; expert groups as in DeepSeek-V3, arXiv:2412.19437. Masked groups
    get -inf, as in DeepSeek-V3's published inference code. Several ports use 0; there we differ.

    Examples:
        >>> logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 9.0])
        >>> route(logits, k=1, bias=bias).expert_ids
        tensor([[2]])
    """
    scores = score(logits, score_function)
    check_two_dimensions(logits)
    for name, value in (("k", k), ("num_groups", num_groups), ("top_groups", top_groups)):
        if isinstance(value, bool | float | str | Tensor):
            raise ValueError(f"{name} must be an integer: got {value!r}.")
    if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite positive number: got {scale!r}.")
    num_experts = logits.shape[-1]
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"the experts must divide into groups of equal size, with 1 <= top_groups <= num_groups: got {num_experts} "
            f"experts, num_groups={num_groups}, top_groups={top_groups}."
        )
    num_selectable = num_experts // num_groups * top_groups
    if not 1 <= k <= num_selectable:
        raise ValueError(f"k must lie between 1 and the {num_selectable} experts that may be chosen: got k={k}.")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != (num_experts,)):
        shape = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias must hold one number per expert: expected shape ({num_experts},), got {shape}.")
    check_mask(mask, logits.shape[0])
    choice = scores.detach() if bias is None else scores.detach() + bias
    if num_groups > 1:
        choice = _mask_expert_groups(choice, num_groups, top_groups)
    expert_ids = choice.topk(k, dim=-1).indices
    weights = scores.gather(-1, expert_ids)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return Routing(logits, scores, expert_ids, weights * scale, mask)
