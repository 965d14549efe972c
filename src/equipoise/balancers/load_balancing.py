"""The load-balancing loss, over a sequence, a micro-batch or the global batch."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers.base import POOLINGS, SCOPES, Balancer, check_bool, check_choice, check_number
from equipoise.load import expert_load, sequence_load
from equipoise.routing import Routing

__all__ = ["LoadBalancingLoss", "load_balancing_loss", "sequence_load_balancing_loss"]


def _probability(routing: Routing, normalise: bool) -> Float[Tensor, "tokens experts"]:
    total = routing.scores.sum(-1, keepdim=True).clamp_min(torch.finfo(routing.scores.dtype).tiny)
    p = routing.scores / total if normalise else routing.scores
    return p if routing.mask is None else p.masked_fill((routing.mask == 0)[:, None], 0)  # also where it is nan


def _num_tokens(routing: Routing) -> Float[Tensor, ""] | int:
    if routing.mask is None:
        return max(routing.scores.shape[0], 1)
    return (routing.mask != 0).sum().clamp_min(1).to(routing.scores.dtype)


def load_balancing_loss(
    routing: Routing, load: Int[Tensor, " experts"] | None = None, *, normalise: bool = True
) -> Float[Tensor, ""]:
    """``E * sum_e f_e P_e``: 1.0 at perfect balance, E/k at the worst; without tokens 0.

        f_e = load_e / sum(load)                    share of the assignments; no gradient
        P_e = mean_t (s_te / sum_j s_tj)            mean score over the unmasked tokens; carries the gradient

    ``load`` is the count whose balance is asked for, in integers: of the micro-batch (default: of ``routing`` itself)
    or pooled over the global batch. It is what the router really chose, after bias and groups, before any capacity.
    Where it opposes P, as a bias or a pooled load can, the value falls below 1.

    ``normalise=False`` takes the raw scores, as Eq. 2 of Loss-Free Balancing is written: on sigmoid scores the gradient
    is then about E/2 times stronger, so coefficients do not carry over. On softmax scores both are the same.

    Source: Qiu et al. 2025, arXiv:2501.11873, Eq. 2 to 6; first Switch Transformer, arXiv:2101.03961, Eq. 4.

    >>> import torch
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
        raise ValueError(f"load must hold counts, integers: got {load.dtype}. Pass counts.long(), or no shares.")
    mass = _probability(routing, normalise).sum(0)
    scale = num_experts / _num_tokens(routing)
    return torch.dot(load.to(mass.dtype), mass) * scale / load.sum().clamp_min(1)


def sequence_load_balancing_loss(routing: Routing, *, normalise: bool = True) -> Float[Tensor, ""]:
    """The load-balancing loss of each sequence by its own counts, averaged over the tokens.

        L = sum_s (N_s / N) * E * sum_e f_e^s P_e^s

    The mean is by token, so that a micro-batch may be cut anywhere between sequences: with sequences of equal length,
    as in the papers, it is the plain mean over sequences. 1.0 when every sequence is even.

    Source: Wang et al. 2024, arXiv:2408.15664, Eq. 2; DeepSeek-V3, arXiv:2412.19437, Eq. 17 to 20.
    """
    load = sequence_load(routing)
    num_experts = routing.scores.shape[-1]
    p = _probability(routing, normalise)
    share = load.to(p.dtype) / load.sum(-1, keepdim=True).clamp_min(1)
    # sum_s N_s f^s P^s = sum over tokens of f^(sequence of t) . p_t
    total = (share[routing.sequence_ids] * p).sum()
    return num_experts * total / _num_tokens(routing)


@final
class LoadBalancingLoss(Balancer):
    """The load-balancing loss ``coefficient * sum over layers of E * sum_e f_e P_e``, its f counted over ``scope``.

    Args:
        coefficient: weight of the loss; Qwen's 3.4B model 8e-3 (paper 2), Switch 1e-2, DeepSeek-V3's sequence loss
            1e-4. The value of a layer is 1 at perfect balance, and layers are *summed*; other libraries take the mean,
            or k at balance, so convert coefficients before you carry them over.
        scope: ``sequence``, ``micro_batch`` (one micro-batch on one rank) or ``global_batch`` (all micro-batches of an
            optimizer step on all ranks: the point of paper 2).
        pooling: for ``global_batch``, when f is known. ``window``: everything that the window has counted when the
            backward runs, which is exact when all forwards come first and the paper's Algorithm 1 in a plain loop;
            ``previous``: the share of the last closed window, one step stale, without a collective of its own (the
            first window has an even share, which moves no normalised score; raw ones it pushes down together).
        normalise: divide the scores of a token by their sum (see ``load_balancing_loss``).

    Source: Qiu et al. 2025, arXiv:2501.11873 (scopes); Wang et al. 2024, arXiv:2408.15664, Eq. 2 (sequence).
    """

    name = "lbl"
    metric = "load_balancing_loss"

    def __init__(
        self,
        coefficient: float = 1e-2,
        scope: str = "global_batch",
        pooling: str = "window",
        normalise: bool = True,
    ):
        self.coefficient = check_number("coefficient", coefficient, positive=False)
        self.scope = check_choice("scope", scope, SCOPES)
        self.pooling = check_choice("pooling", pooling, POOLINGS)
        if pooling != "window" and scope != "global_batch":
            raise ValueError(
                f"pooling={pooling} must go with scope=global_batch: got scope={scope}, whose counts are known at once."
            )
        self.normalise = check_bool("normalise", normalise)

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        if self.scope == "sequence":
            return sequence_load_balancing_loss(routing, normalise=self.normalise)
        return load_balancing_loss(routing, load, normalise=self.normalise)

    @torch.no_grad()
    def score_gradient(
        self, routing: Routing, load: Int[Tensor, " experts"] | None, factor: float | Float[Tensor, ""] = 1.0
    ) -> Float[Tensor, "tokens experts"]:
        """``c_e = factor E f_e / N`` for raw scores; ``(c_e - sum_j p_j c_j) / sum_j s_j`` for normalised ones."""
        scores = routing.scores
        factor = factor * (scores.shape[-1] / _num_tokens(routing))
        if self.scope == "sequence":
            load = sequence_load(routing)
        elif load is None:
            load = expert_load(routing.expert_ids, scores.shape[-1], routing.mask)
        by_count = factor / load.sum(-1, keepdim=True).clamp_min(1).to(scores.dtype)
        slope = load * by_count.to(scores.dtype)  # of the loss by p
        if self.scope == "sequence":
            slope = slope[routing.sequence_ids]
        masked = None if routing.mask is None else (routing.mask == 0)[:, None]
        if not self.normalise:
            return slope.expand_as(scores) if masked is None else slope.expand_as(scores).masked_fill(masked, 0)
        total = scores.sum(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).tiny)
        mean = (scores * slope).sum(-1, keepdim=True) if slope.dim() == 2 else (scores @ slope)[:, None]
        found = (slope - mean.div_(total)).div_(total)
        return found if masked is None else found.masked_fill_(masked, 0)
