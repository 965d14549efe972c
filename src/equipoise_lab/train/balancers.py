"""Balancers of other papers, for comparison. Strategy strings of the lab know them; the library does not.

shuffle:coefficient=1e-2   the global load-balancing loss with the noise of a micro-batch
phi:coefficient=1e-2       negative entropy of mean scores
shinka:coefficient=1e-2    a load-balancing loss with a term for experts that get almost no load
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.attachment import attach
from equipoise.balance import Balance
from equipoise.balancers import Balancer, LayerStack, load_balancing_loss, parse_strategy
from equipoise.balancers.base import check_number
from equipoise.errors import UsageError
from equipoise.load import expert_load
from equipoise.recipes import RECIPES
from equipoise.routing import Routing
from equipoise_lab.train.candidates import ContrastLoss, GroupLoss, UnbiasedLoss
from equipoise_lab.train.config import Train
from equipoise_lab.train.router_calls import RouterCalls, bytes_digest

__all__ = [
    "PhiBalancing",
    "ShinkaLoss",
    "ShuffleControl",
    "attach_strategy",
    "check_strategy",
    "parse_lab_strategy",
    "shinka_loss",
]

UNIT = 2**24  # integer that stands for a score of 1 in integer sums


def _normalised(routing: Routing) -> Float[Tensor, "tokens experts"]:
    """The scores of each token divided by their sum; 0 for masked tokens."""
    p = routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(torch.finfo(routing.scores.dtype).tiny)
    return p if routing.mask is None else p * routing.mask.to(p.dtype)[:, None]


def _mean_normalised(routing: Routing) -> Float[Tensor, " experts"]:
    """P_e: the mean normalised score over the unmasked tokens; 0 if there are none."""
    p = _normalised(routing)
    if routing.mask is None:
        return p.sum(0) / max(p.shape[0], 1)
    return p.sum(0) / routing.mask.sum().clamp_min(1).to(p.dtype)


@final
class ShuffleControl(Balancer):
    """``coefficient * sum over layers of E * sum_e f_e P_e``, with f counted over tokens drawn from the global batch.

    For each micro-batch it draws as many tokens as the micro-batch has, without replacement, from all micro-batches of
    the window. So f has the scope of the global batch and the noise of a micro-batch. P comes from the micro-batch, as
    in every load-balancing loss. Masked tokens are not drawn.

    The draw is seeded by a hash of the micro-batch's choices and the number of tokens to draw from. It is the same in
    every run, and nothing has to be saved.

    Limits: the window must be complete when the backward runs (order forwards_first), and it must be on one process.
    The logged value uses the tokens that were known at the forward. A skipped step leaves its tokens to the next
    window, so do not use it in a loop that skips steps.

    Source: Qiu et al. 2025, arXiv:2501.11873, the control with shuffled batches in Table 2.
    """

    name = "shuffle"
    metric = "load_balancing_loss"

    def __init__(self, coefficient: float = 1e-2):
        self.coefficient = check_number("coefficient", coefficient, positive=False)

    def prepare(self, layers: LayerStack) -> None:
        self._calls = RouterCalls()
        self._choices: list[list[Tensor]] = [[] for _ in layers.bias]  # choices of unmasked tokens, by layer and call

    def statistic(self, routing: Routing, row: int) -> None:
        if routing.expert_ids.shape[0]:
            self._calls.add(routing, row)
            self._choices[row].append(_unmasked(routing))

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        return load_balancing_loss(routing, expert_load(self.draw(routing), routing.scores.shape[-1]))

    def draw(self, routing: Routing) -> Int[Tensor, "tokens k"]:
        """The choices of the drawn tokens. The open window must have counted the call."""
        pooled = torch.cat(self._choices[self._calls.row_of(routing)])
        seed = int.from_bytes(bytes_digest(routing.expert_ids, pooled.shape[0], size=7), "big")
        order = torch.randperm(pooled.shape[0], generator=torch.Generator().manual_seed(seed))
        return pooled[order[: _unmasked(routing).shape[0]].to(pooled.device)]

    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        self._calls.clear()
        self._choices = [[] for _ in self._choices]


def _unmasked(routing: Routing) -> Int[Tensor, "tokens k"]:
    return routing.expert_ids if routing.mask is None else routing.expert_ids[routing.mask != 0]


@final
class PhiBalancing(Balancer):
    """phi-balancing with the negative entropy: ``coefficient * sum over layers of sum_e (log m_e + 1) P_e``.

        m <- memory * m + (1 - memory) * p

    p is the mean of the normalised scores over the global batch, without gradient. P is the same mean over the
    micro-batch and carries the gradient.

    Args:
        coefficient: weight of the loss.
        memory: share of m that stays from window to window, from 0 to below 1; 0.4 is the paper's step of 0.6.

    It balances scores, not counts. Where all m_e are equal the value is 1 - log(E). p is summed in integers (2^24
    stands for a score of 1), so it does not depend on how the batch is split. An m below 2^-24 counts as 2^-24.

    Source: arXiv:2605.15403. Where we differ: m comes from the earlier windows, so it is one step old, and it starts
    with equal shares. Layers are summed, as in all our losses.
    """

    name = "phi"
    metric = "phi_loss"
    scope = "token"

    def __init__(self, coefficient: float = 1e-2, memory: float = 0.4):
        self.coefficient = check_number("coefficient", coefficient, positive=False)
        self.memory = check_number("memory", memory, positive=False)
        if self.memory >= 1:
            raise ValueError(f"memory must be below 1: got {memory!r}.")

    def prepare(self, layers: LayerStack) -> None:
        self._calls = RouterCalls()
        self._excess = torch.zeros_like(layers.bias, dtype=torch.float64)  # m - 1/E

    def state(self) -> dict[str, Float[Tensor, "layers experts"]]:
        return {"excess": self._excess}

    def statistic(self, routing: Routing, row: int) -> Int[Tensor, " experts_and_tokens"]:
        self._calls.add(routing, row)
        p = (_normalised(routing).detach().double() * UNIT).round().long()
        tokens = p.new_tensor(p.shape[0]) if routing.mask is None else (routing.mask != 0).sum()
        return torch.cat([p.sum(0), tokens[None]])

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        m = self._excess[self._calls.row_of(routing)] + 1 / routing.scores.shape[-1]
        p = _mean_normalised(routing)
        return ((m.clamp_min(1 / UNIT).log() + 1).to(p.dtype) * p).sum()

    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        assert statistic is not None
        self._calls.clear()
        sums = torch.stack(list(statistic)).double()
        tokens = sums[:, -1:]
        excess = sums[:, :-1] / (UNIT * tokens.clamp_min(1)) - 1 / load.shape[-1]
        moved = self.memory * self._excess + (1 - self.memory) * excess
        self._excess.copy_(torch.where(tokens > 0, moved, self._excess))


def shinka_loss(routing: Routing, load: Int[Tensor, " experts"]) -> Float[Tensor, ""]:
    """``E sum_e f_e P_e + 0.1 s(P) sum_e max(0, tau - f_e)``, with

        s(P) = 0.5 + (1 - H(P) / log E)     H(P) = -sum_e P_e log P_e
        tau  = 0.064 / E

    f is the share of the assignments in ``load``, without gradient. P is the mean of the normalised scores over the
    unmasked tokens. The second term therefore acts through s(P) only. While any expert has less than 6.4 % of an even
    share, it makes P more even as a whole; it does not favour that expert. The loss is 1 at perfect balance and 0
    without tokens. The second term is not a mean over tokens: it depends on how the tokens are split into calls.

    Source: ShinkaEvolve, arXiv:2509.19349.
    """
    num_experts = routing.scores.shape[-1]
    p = _mean_normalised(routing)
    share = load.to(p.dtype) / load.sum().clamp_min(1).to(p.dtype)
    entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()
    strength = 1.5 - entropy / math.log(num_experts)
    deficit = (0.064 / num_experts - share).clamp_min(0).sum()
    has_tokens = (p.detach().sum() > 0).to(p.dtype)
    return num_experts * (share * p).sum() + 0.1 * strength * deficit * has_tokens


@final
class ShinkaLoss(Balancer):
    """``coefficient * sum over layers of shinka_loss``, with f counted over the global batch.

    Args:
        coefficient: weight of the loss.

    Source: see ``shinka_loss``. Where we differ: layers are summed, as in all our losses.
    """

    name = "shinka"
    metric = "shinka_loss"

    def __init__(self, coefficient: float = 1e-2):
        self.coefficient = check_number("coefficient", coefficient, positive=False)

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        assert load is not None
        return shinka_loss(routing, load)


# ---- strategies of the lab ----

LAB_BALANCERS: tuple[type[Balancer], ...] = (
    ShuffleControl,
    PhiBalancing,
    ShinkaLoss,
    UnbiasedLoss,
    GroupLoss,
    ContrastLoss,
)


def parse_lab_strategy(text: str) -> list[Balancer]:
    """Like ``parse_strategy``, but it also knows the balancers of this file."""
    return parse_strategy(text, more=LAB_BALANCERS)


def attach_strategy(model: nn.Module, strategy: str, biases: Mapping[str, Tensor] | Path | None = None) -> Balance:
    """Like ``attach``, for a strategy string of the lab."""
    balancers: Sequence[Any] = [strategy] if strategy in RECIPES else parse_lab_strategy(strategy)
    return attach(model, *balancers, biases=biases)


def check_strategy(config: Train, num_ranks: int) -> None:
    """Raises UsageError if a strategy of the run does not exist or does not work with the run's options."""
    for strategy in filter(None, (config.strategy, config.then)):
        balancers = parse_lab_strategy(strategy)
        if config.model is None:
            for balancer in balancers:
                if isinstance(balancer, GroupLoss):
                    balancer.check_experts(config.experts)
        if not any(isinstance(balancer, ShuffleControl | UnbiasedLoss) for balancer in balancers):
            continue
        if num_ranks > 1:
            raise UsageError(
                f"{strategy} must run in one process, because it needs every token of a step: got {num_ranks} ranks. "
                "Start it without torchrun."
            )
        if config.order != "forwards_first":
            raise UsageError(
                f"{strategy} must know every token of a step before the backward: got --order {config.order}. Use "
                "--order forwards_first."
            )
