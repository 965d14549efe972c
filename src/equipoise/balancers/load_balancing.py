"""The load-balancing loss, over a sequence, a micro-batch or the global batch."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers.base import POOLINGS, SCOPES, Balancer, Pooling, Scope, check_bool, check_number
from equipoise.errors import check_choice
from equipoise.load import expert_load, sequence_load
from equipoise.routing import Routing, widest_float

__all__ = ["LoadBalancingLoss", "load_balancing_loss", "sequence_load_balancing_loss"]


def _probability(routing: Routing, normalise: bool) -> Float[Tensor, "tokens experts"]:
    total = routing.scores.sum(-1, keepdim=True).clamp_min(torch.finfo(routing.scores.dtype).tiny)
    p = routing.scores / total if normalise else routing.scores
    return p if routing.mask is None else p.masked_fill((routing.mask == 0)[:, None], 0)  # nan too


def _num_tokens(routing: Routing) -> Float[Tensor, ""] | int:
    if routing.mask is None:
        return max(routing.scores.shape[0], 1)
    return (routing.mask != 0).sum().clamp_min(1).to(routing.scores.dtype)


def load_balancing_loss(
    routing: Routing, load: Int[Tensor, " experts"] | None = None, *, normalise: bool = True
) -> Float[Tensor, ""]:
    """``E * sum_e f_e P_e``: 1 at perfect balance, up to E/k at collapse, 0 without tokens.

        f_e = load_e / sum(load)           share of the assignments; no gradient
        P_e = mean_t (s_te / sum_j s_tj)   mean score of unmasked tokens; has the gradient

    If f and P disagree, as with a bias or a pooled load, the value can be below 1.

    Args:
        routing: what a router call decided.
        load: the integer counts to be balanced, ``[experts]``: those of the micro-batch (the default, counted from
            ``routing``) or those pooled over the global batch. They are the router's real choices: after bias and
            expert groups, before any capacity.
        normalise: divide each token's scores by their sum. False takes the raw scores, as Eq. 2 of Loss-Free Balancing
            is written. On sigmoid scores the gradient is then about E/2 times stronger, so coefficients do not carry
            over. On softmax scores both are the same.

    Raises:
        ValueError: ``load`` has another shape or is floating point.

    Source: Qiu et al. 2025, arXiv:2501.11873, Eq. 2 to 6; first Switch Transformer, arXiv:2101.03961, Eq. 4.

    Examples:
        >>> from equipoise.routing import route
        >>> load_balancing_loss(route(torch.zeros(8, 4), k=1), torch.tensor([2, 2, 2, 2]))
        tensor(1.)
    """
    num_experts = routing.scores.shape[-1]
    if load is None:
        load = expert_load(routing.expert_ids, num_experts, routing.mask)
    if load.shape != (num_experts,):
        raise ValueError(
            f"load must hold one count per expert: expected shape ({num_experts},), got {tuple(load.shape)}. Under "
            "expert parallelism pass the counts of all experts, not only those on this rank."
        )
    if load.is_floating_point():
        raise ValueError(f"load must hold counts, integers: got {load.dtype}. Pass counts, not shares.")
    mass = _probability(routing, normalise).sum(0)
    scale = num_experts / _num_tokens(routing)
    return torch.dot(load.to(mass.dtype), mass) * scale / load.sum().clamp_min(1)


def sequence_load_balancing_loss(routing: Routing, *, normalise: bool = True) -> Float[Tensor, ""]:
    """The load-balancing loss of each sequence with its own counts, averaged over the tokens.

        L = sum_s (N_s / N) * E * sum_e f_e^s P_e^s
        N_s: unmasked tokens of sequence s, N: of all

    1 when every sequence is even. The mean is by token, so a micro-batch may be cut anywhere between sequences. For
    sequences of equal length, as in the papers, it is the plain mean over sequences.

    Args:
        routing: what a router call decided, with ``sequence_ids``.
        normalise: as for ``load_balancing_loss``.

    Raises:
        ValueError: ``sequence_ids`` is missing or does not fit.

    Source: Wang et al. 2024, arXiv:2408.15664, Eq. 2; DeepSeek-V3, arXiv:2412.19437, Eq. 17 to 20.
    """
    load, num_experts = sequence_load(routing), routing.scores.shape[-1]
    p = _probability(routing, normalise)
    share = load.to(p.dtype) / load.sum(-1, keepdim=True).clamp_min(1)
    total = (share[routing.sequence_ids] * p).sum()  # = sum_s N_s f^s P^s
    return num_experts * total / _num_tokens(routing)


@final
class LoadBalancingLoss(Balancer):
    """The load-balancing loss ``coefficient * sum over layers of E * sum_e f_e P_e``, with f counted over ``scope``.

    Args:
        coefficient: weight of the loss: 8e-3 for Qwen's 3.4B model (paper 2), 1e-2 in Switch, 1e-4 for DeepSeek-V3's
            sequence loss. A layer's value is 1 at perfect balance, and layers are *summed*. Other libraries take the
            mean over layers or have k at balance: convert their coefficients with ``convert_coefficient``.
        scope: whose counts f is made of: ``sequence``, ``micro_batch`` (one micro-batch on one rank) or
            ``global_batch`` (all micro-batches of an optimizer step on all ranks). The last is the point of paper 2,
            Qiu et al. 2025, arXiv:2501.11873.
        pooling: which counts ``global_batch`` takes, those of the open ``window`` or of the ``previous`` one.
            ``window``: everything that the window has counted when the backward runs. That is exact if all forwards
            come first, and the paper's Algorithm 1 in a plain loop. ``previous``: the shares of the last closed window,
            one step stale, without a collective of its own. The first window has even shares: they move no normalised
            score and push raw scores down together.
        normalise: divide each token's scores by their sum, as in ``load_balancing_loss``, which gives the sources.

    Raises:
        ValueError: a value is not allowed, or ``pooling`` is given with another scope than ``global_batch``.
    """

    name = "lbl"
    metric = "load_balancing_loss"

    def __init__(
        self,
        coefficient: float = 1e-2,
        scope: Scope = "global_batch",
        pooling: Pooling = "window",
        normalise: bool = True,
    ):
        self.coefficient = check_number("coefficient", coefficient, positive=False)
        self.scope = check_choice("scope", scope, SCOPES)
        self.pooling = check_choice("pooling", pooling, POOLINGS)
        if pooling != "window" and scope != "global_batch":
            raise ValueError(
                f"pooling={pooling} must go with scope=global_batch: got scope={scope}. Its counts are known at once, "
                "so leave pooling out."
            )
        self.normalise = check_bool("normalise", normalise)

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        if self.scope == "sequence":
            return sequence_load_balancing_loss(routing, normalise=self.normalise)
        return load_balancing_loss(routing, load, normalise=self.normalise)

    def slopes(self, load: Int[Tensor, "*scopes experts"]) -> Float[Tensor, "*scopes experts"]:
        """``E f_e``"""
        precise = load.to(widest_float(load.device))
        return precise * (load.shape[-1] / precise.sum(-1, keepdim=True).clamp_min(1))
