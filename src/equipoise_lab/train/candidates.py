"""Losses of our own, tried beside those of papers. Strategy strings of the lab know them; the library does not.

lbl-unbiased:coefficient=1e-2    counts what a router would choose without its bias
lbl-groups:coefficient=1e-2      counts groups of experts, as on the ranks of expert parallelism
lbl-contrast:coefficient=1e-2    even over the global batch, uneven within a micro-batch

All count over the global batch, except the second part of lbl-contrast. They take P as the load-balancing loss does:
the mean normalised score of a micro-batch.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers import Balancer, LayerStack, load_balancing_loss
from equipoise.balancers.base import check_number, check_whole
from equipoise.errors import UsageError
from equipoise.load import expert_load
from equipoise.routing import Routing
from equipoise_lab.train.router_calls import RouterCalls

__all__ = ["ContrastLoss", "GroupLoss", "UnbiasedLoss"]


@final
class UnbiasedLoss(Balancer):
    """``coefficient * sum over layers of E * sum_e f_e P_e``, with f counted from the choice without the bias.

    Why: beside a bias that balances well, f of the real choices is even, and the usual loss has no gradient. The scores
    may then drift as far apart as the bias can follow. Here f is the share of each expert among the k best *scores* of
    each token, over the global batch. So the loss keeps the scores themselves near balance, and the bias does the rest.
    Without a bias it is the usual loss.

    Args:
        coefficient: weight of the loss.

    Limits: the window must be complete when the backward runs (order forwards_first), and it must be on one process.
    A skipped step leaves its counts to the next window, so do not use it in a loop that skips steps. Routers that
    choose groups of experts first are not followed: the k best scores of all experts are counted.
    """

    name = "lbl-unbiased"
    metric = "load_balancing_loss"

    def __init__(self, coefficient: float = 1e-2):
        self.coefficient = check_number("coefficient", coefficient, positive=False)

    def prepare(self, layers: LayerStack) -> None:
        self._calls = RouterCalls()
        self._load = torch.zeros(layers.bias.shape, dtype=torch.int64, device=layers.bias.device)  # of the window

    def statistic(self, routing: Routing, row: int) -> None:
        if routing.expert_ids.shape[0]:
            self._calls.add(routing, row)
            unbiased = routing.scores.detach().topk(routing.expert_ids.shape[-1], dim=-1).indices
            self._load[row] += expert_load(unbiased, routing.scores.shape[-1], routing.mask)

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        return load_balancing_loss(routing, self._load[self._calls.row_of(routing)])

    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        self._calls.clear()
        self._load.zero_()


@final
class GroupLoss(Balancer):
    """``coefficient * sum over layers of G * sum_g F_g Q_g``, over G groups of consecutive experts.

        F_g = sum of f_e over the experts of group g        share of the assignments, over the global batch
        Q_g = sum of P_e over the same                      has the gradient

    Why: under expert parallelism it is the ranks that must be even. A loss for them leaves the experts of a rank free;
    a bias may balance these. 1 at perfect balance. With a group for each expert it is the usual loss.

    Args:
        coefficient: weight of the loss.
        groups: number of groups; must divide the number of experts.

    Source: the device-level balance loss of DeepSeek-V2, arXiv:2405.04434, section 2.2.3, which has the same value.
    Where we differ: f is counted over the global batch.
    """

    name = "lbl-groups"
    metric = "load_balancing_loss"

    def __init__(self, coefficient: float = 1e-2, groups: int = 4):
        self.coefficient = check_number("coefficient", coefficient, positive=False)
        self.groups = check_whole("groups", groups, least=2)

    def check_experts(self, num_experts: int) -> None:
        if num_experts % self.groups:
            raise UsageError(f"groups of {self.name} must divide the {num_experts} experts: got {self.groups}.")

    def prepare(self, layers: LayerStack) -> None:
        self.check_experts(layers.bias.shape[-1])

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        assert load is not None
        size = load.shape[-1] // self.groups
        load_of_groups = load.view(self.groups, size).sum(-1)
        # Every expert gets the load of its group. E sum_e F_g(e) P_e / size = G sum_g F_g Q_g, since E / size = G and
        # load_balancing_loss divides by the sum, which is size times too large.
        return load_balancing_loss(routing, load_of_groups.repeat_interleave(size))


@final
class ContrastLoss(Balancer):
    """``coefficient * sum over layers of E * sum_e (f_e - within * g_e) P_e``, with shares of the assignments

        f_e    over the global batch
        g_e    over the micro-batch

    The first term is the loss over the global batch, the second that within micro-batches, with the opposite sign.

    Why: a loss within micro-batches keeps experts from specialising (arXiv:2501.11873). So its opposite should help
    them: a micro-batch prefers the experts that it chooses already, while the global batch stays even. It needs no
    labels of domains, but micro-batches that differ.

    Args:
        coefficient: weight of the loss.
        within: weight of the second term, from 0 to below 1; 0 is the usual loss.

    Limit: a router call is taken for a micro-batch.
    """

    name = "lbl-contrast"
    metric = "contrast_loss"

    def __init__(self, coefficient: float = 1e-2, within: float = 0.1):
        self.coefficient = check_number("coefficient", coefficient, positive=False)
        self.within = check_number("within", within, positive=False)
        if self.within >= 1:
            raise ValueError(f"within must be below 1: got {within!r}.")

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        return load_balancing_loss(routing, load) - self.within * load_balancing_loss(routing)
