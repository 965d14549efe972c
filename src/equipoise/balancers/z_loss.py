"""The router z-loss: keeps the logits small."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers.base import Balancer, check_number
from equipoise.routing import Routing, check_mask, check_two_dimensions

__all__ = ["ZLoss", "z_loss"]


def z_loss(logits: Float[Tensor, "tokens experts"], mask: Float[Tensor, " tokens"] | None = None) -> Float[Tensor, ""]:
    """``mean_t logsumexp_e(z_te)^2`` over the unmasked tokens, in float32 or wider; 0 without tokens.

    It is ``log(E)^2`` if all logits are 0, and smaller if all are slightly negative. It does not balance: it keeps
    logits in the range where low precision can still tell them apart.

    Args:
        logits: of a router, ``[tokens, experts]``.
        mask: 1 for a token that counts, 0 for padding; default: all count.

    Raises:
        ValueError: ``logits`` or ``mask`` has another shape.

    Source: Zoph et al. 2022, ST-MoE, arXiv:2202.08906, Eq. 5.

    Examples:
        >>> z_loss(torch.zeros(3, 8))  # log(8)^2
        tensor(4.3241)
    """
    check_two_dimensions(logits)
    check_mask(mask, logits.shape[0])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        return logits.logsumexp(-1).square().sum() / max(logits.shape[0], 1)
    masked = mask == 0  # filled before and after logsumexp, because a masked token may hold nan
    squares = logits.masked_fill(masked[:, None], 0).logsumexp(-1).square()
    return squares.masked_fill(masked, 0).sum() / (~masked).sum().clamp_min(1)


@final
class ZLoss(Balancer):
    """The router z-loss ``coefficient * sum over layers of mean_t logsumexp(z_t)^2``. It complements a balancer.

    It needs no counts, so it has no scope.

    Args:
        coefficient: weight of the loss, 1e-3 in ST-MoE and OLMoE. At least 0.

    Source: as ``z_loss``. Where we differ: padding is left out, and layers are summed, as in all our losses.
    """

    name = "z"
    metric = "z_loss"
    scope = "token"

    def __init__(self, coefficient: float = 1e-3):
        self.coefficient = check_number("coefficient", coefficient, positive=False)

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        return z_loss(routing.logits, routing.mask)
