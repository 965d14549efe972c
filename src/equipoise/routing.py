"""hidden -> logits -> scores -> choice: how a router decides, as plain functions of tensors.

The bias of a loss-free balancer enters at one place only, the choice; the weights are always the plain scores.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["SCORE_FUNCTIONS", "Routing", "route", "score", "score_backward", "without_autocast"]

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrt_softplus")


class Routing(NamedTuple):
    """What one router call decided. Loads, losses and balancers read this and nothing else.

    ``mask`` is 1 for a token that counts and 0 for padding; None means that every token counts. ``sequence_ids`` number
    the sequences 0, 1, ...; ``num_sequences`` is an upper bound of how many there are (known without looking at the
    data). None means that nobody said which token belongs to which sequence.
    """

    logits: Float[Tensor, "tokens experts"]  # the router's logits
    scores: Float[Tensor, "tokens experts"]  # float32 or wider, before any bias
    expert_ids: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]  # combine weights, taken from the scores
    mask: Float[Tensor, " tokens"] | None = None
    sequence_ids: Int[Tensor, " tokens"] | None = None
    num_sequences: int = 0


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For products that must be in the dtype of what comes, whoever runs them."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def score(logits: Float[Tensor, "tokens experts"], score_function: str = "softmax") -> Float[Tensor, "tokens experts"]:
    """The router's scores, in float32 or wider.

        softmax         s_e = exp(z_e) / sum_j exp(z_j)
        sigmoid         s_e = 1 / (1 + exp(-z_e))                 DeepSeek-V3, arXiv:2412.19437
        sqrt_softplus   s_e = sqrt(log(1 + exp(z_e)))             DeepSeek-V4, arXiv:2606.19348

    In float32 the last two end where exp(z) does, at z = -88: below, sigmoid scores are 0 and those of sqrt_softplus
    all the same, none with a slope. A token whose logits all lie there trains no router, and no balancing loss sees it.

    Raises ``ValueError`` for another score function, and for logits that are not floating point.

    >>> score(torch.tensor([[0.0, 0.0]]), "sigmoid")
    tensor([[0.5000, 0.5000]])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must be a tensor of floating point numbers: got {found}.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_function == "softmax":
        return logits.softmax(-1)
    if score_function == "sigmoid":
        return logits.sigmoid()
    if score_function == "sqrt_softplus":
        # at z < -104 float32 softplus is 0, where sqrt has no slope
        return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    raise ValueError(f"score_function must be one of {', '.join(SCORE_FUNCTIONS)}: got {score_function!r}.")


def score_backward(
    gradient: Float[Tensor, "tokens experts"],
    logits: Float[Tensor, "tokens experts"],
    scores: Float[Tensor, "tokens experts"],
    score_function: str,
) -> Float[Tensor, "tokens experts"]:
    """The gradient by the logits, in their dtype, of what has ``gradient`` by ``scores = score(logits, score_function)``."""
    if score_function == "softmax":
        found = torch.ops.aten._softmax_backward_data(gradient, scores, -1, scores.dtype)
    elif score_function == "sigmoid":
        found = torch.ops.aten.sigmoid_backward(gradient, scores)
    else:
        found = gradient * logits.to(scores.dtype).sigmoid() / (2 * scores)
        smallest = torch.finfo(scores.dtype).tiny ** 0.5
        found = found.masked_fill(scores <= smallest, 0)  # where softplus is clamped
    return found.to(logits.dtype)


def _mask_groups(
    choice: Float[Tensor, "tokens experts"], num_groups: int, top_groups: int
) -> Float[Tensor, "tokens experts"]:
    grouped = choice.unflatten(-1, (num_groups, -1))  # (tokens, groups, experts a group)
    value = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(value, dtype=torch.bool).scatter_(-1, value.topk(top_groups, dim=-1).indices, True)
    # -inf, not 0: with negative biases an expert of a masked group would win against 0
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def route(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    *,
    score_function: str = "softmax",
    bias: Float[Tensor, " experts"] | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalise: bool = False,
    scale: float = 1.0,
    mask: Float[Tensor, " tokens"] | None = None,
) -> Routing:
    """Chooses k experts a token.

        chosen  = top-k of (score + bias), within the best groups if there are groups
        weights = scale * score[chosen]   (/ their sum if ``renormalise``)

    A group's value is the sum of its two highest biased scores; only experts of the ``top_groups`` best groups can be
    chosen. The bias changes the choice, never the weights.

    Args:
        logits: the router's logits.
        k: experts a token, 1 <= k <= experts of the groups that may be chosen.
        score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus``.
        bias: added to the scores for the choice only; float32, score units.
        num_groups, top_groups: group-limited routing; 1 and 1 switch it off.
        renormalise: divide the weights by their sum over the chosen experts.
        scale: factor on the weights (DeepSeek's routed scaling factor).
        mask: 1 for a token that counts, 0 for padding; only carried along.

    Raises ``ValueError`` for sizes that do not fit, logits that are not floating point, a scale that is not positive.

    Source: Wang et al. 2024, arXiv:2408.15664, Eq. 3; groups as in DeepSeek-V3, arXiv:2412.19437. Where we differ: the
    published inference code of DeepSeek-V3 masks groups with -inf too, but several ports use 0, which we do not.

    >>> route(torch.tensor([[2.0, 1.0, 0.0]]), k=1, bias=torch.tensor([0.0, 0.0, 9.0])).expert_ids
    tensor([[2]])
    """
    scores = score(logits, score_function)
    if logits.dim() != 2:
        raise ValueError(
            f"logits must have the shape (tokens, experts): got {tuple(logits.shape)}. Flatten batch and sequence."
        )
    for name, value in (("k", k), ("num_groups", num_groups), ("top_groups", top_groups)):
        if isinstance(value, bool | float | str | Tensor):
            raise ValueError(f"{name} must be an integer: got {value!r}.")
    if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite positive number: got {scale!r}.")
    num_experts = logits.shape[-1]
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"the experts must divide into groups, and 1 <= top_groups <= num_groups: got {num_experts} experts, "
            f"num_groups={num_groups}, top_groups={top_groups}."
        )
    available = num_experts // num_groups * top_groups
    if not 1 <= k <= available:
        raise ValueError(f"k must lie between 1 and the {available} experts that may be chosen: got k={k}.")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != (num_experts,)):
        found = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias must hold one number per expert: expected shape ({num_experts},), got {found}.")
    if mask is not None and mask.shape != logits.shape[:1]:
        raise ValueError(
            f"mask must hold one number per token: expected shape ({logits.shape[0]},), got {tuple(mask.shape)}."
        )
    choice = scores.detach() if bias is None else scores.detach() + bias
    if num_groups > 1:
        choice = _mask_groups(choice, num_groups, top_groups)
    expert_ids = choice.topk(k, dim=-1).indices
    weights = scores.gather(-1, expert_ids)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return Routing(logits, scores, expert_ids, weights * scale, mask)
