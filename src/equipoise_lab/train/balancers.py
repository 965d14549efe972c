"""Mechanisms of other papers, for comparison: in strategy strings of the lab only, not in the core.

shuffle:coefficient=1e-2   the global load-balancing loss with the noise of a micro-batch
phi:coefficient=1e-2       negative entropy of mean scores
shinka:coefficient=1e-2    a load-balancing loss that looks after experts with almost no load
"""

import hashlib
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
from equipoise.errors import EquipoiseError, UsageError
from equipoise.load import expert_load
from equipoise.recipes import RECIPES
from equipoise.routing import Routing
from equipoise_lab.train.config import Train

__all__ = [
    "PhiBalancing",
    "ShinkaLoss",
    "ShuffleControl",
    "attach_strategy",
    "check_strategy",
    "parse_lab_strategy",
    "shinka_loss",
]

UNIT = 2**24  # of a score in a sum of integers


class _Rows:
    """Which layer a router call of the open window was of: a loss is asked for without being told."""

    def __init__(self) -> None:
        self._row_of: dict[bytes, int] = {}

    def keep(self, routing: Routing, row: int) -> None:
        self._row_of[self._key(routing)] = row

    def find(self, routing: Routing) -> int:
        row = self._row_of.get(self._key(routing))
        if row is None:
            raise EquipoiseError(
                "a loss of the lab must be asked for a router call that the open window has counted: this one is of "
                "another. Use it in the lab's loop, where a window is closed after its backward."
            )
        return row

    def clear(self) -> None:
        self._row_of.clear()

    @staticmethod
    def _key(routing: Routing) -> bytes:
        return _hash(routing.expert_ids, routing.logits.detach().float())


def _hash(*values: Tensor | int, size: int = 16) -> bytes:
    found = hashlib.blake2b(digest_size=size)
    for value in values:
        found.update(value.cpu().contiguous().numpy().tobytes() if isinstance(value, Tensor) else b"%d" % value)
    return found.digest()


def _normalised(routing: Routing) -> Float[Tensor, "tokens experts"]:
    """Scores of a token divided by their sum; 0 for masked tokens."""
    p = routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(torch.finfo(routing.scores.dtype).tiny)
    return p if routing.mask is None else p * routing.mask.to(p.dtype)[:, None]


def _mean_normalised(routing: Routing) -> Float[Tensor, " experts"]:
    """P_e: the mean over the unmasked tokens; 0 without any."""
    p = _normalised(routing)
    if routing.mask is None:
        return p.sum(0) / max(p.shape[0], 1)
    return p.sum(0) / routing.mask.sum().clamp_min(1).to(p.dtype)


@final
class ShuffleControl(Balancer):
    """``coefficient * sum over layers of E * sum_e f_e P_e``, f counted over tokens drawn from the global batch.

    As many tokens as the micro-batch has, drawn without replacement from all micro-batches of the window: the scope is
    global, the noise of f that of a micro-batch. P is the micro-batch's, as ever. Masked tokens are not drawn.

    The draw is seeded by a hash of the micro-batch's own choices and the number of tokens to draw from, so it is the
    same in every run and nothing has to be saved. The window must be complete when the backward runs (order
    forwards_first) and on one process; the value in the logs is by the tokens that were there at the forward. A step
    that is skipped leaves its tokens to the next window: not for loops that skip steps.

    Source: Qiu et al. 2025, arXiv:2501.11873, the shuffled batches of Table 2.
    """

    name = "shuffle"
    metric = "load_balancing_loss"

    def __init__(self, coefficient: float = 1e-2):
        self.coefficient = check_number("coefficient", coefficient, positive=False)

    def prepare(self, layers: LayerStack) -> None:
        self._rows = _Rows()
        self._choices: list[list[Tensor]] = [[] for _ in layers.bias]  # of the unmasked tokens, by layer and call

    def statistic(self, routing: Routing, row: int) -> None:
        if routing.expert_ids.shape[0]:
            self._rows.keep(routing, row)
            self._choices[row].append(_unmasked(routing))

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        return load_balancing_loss(routing, expert_load(self.draw(routing), routing.scores.shape[-1]))

    def draw(self, routing: Routing) -> Int[Tensor, "tokens k"]:
        """The choices of the drawn tokens, for a call that the window has counted."""
        pooled = torch.cat(self._choices[self._rows.find(routing)])
        seed = int.from_bytes(_hash(routing.expert_ids, pooled.shape[0], size=7), "big")
        order = torch.randperm(pooled.shape[0], generator=torch.Generator().manual_seed(seed))
        return pooled[order[: _unmasked(routing).shape[0]].to(pooled.device)]

    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        self._rows.clear()
        self._choices = [[] for _ in self._choices]


def _unmasked(routing: Routing) -> Int[Tensor, "tokens k"]:
    return routing.expert_ids if routing.mask is None else routing.expert_ids[routing.mask != 0]


@final
class PhiBalancing(Balancer):
    """phi-balancing with the negative entropy: ``coefficient * sum over layers of sum_e (log m_e + 1) P_e``.

        m <- memory * m + (1 - memory) * p,     p the mean normalised scores of the global batch; no gradient

    Args:
        coefficient: weight of the loss.
        memory: what is kept of m from window to window, from 0 to below 1; 0.4 is the paper's step of 0.6.

    It balances scores, not counts. P is the micro-batch's and carries the gradient. The value is 1 - log(E) at an even
    m. p is summed in integers, 2^24 to a score of 1, so that it is the same however the batch is cut; an m below 2^-24
    is taken for 2^-24.

    Source: arXiv:2605.15403. Where we differ: m is that of the windows before, one step stale, an even share at first;
    layers are summed, as all our losses are.
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
        self._rows = _Rows()
        self._excess = torch.zeros_like(layers.bias, dtype=torch.float64)  # m - 1/E

    def state(self) -> dict[str, Float[Tensor, "layers experts"]]:
        return {"excess": self._excess}

    def statistic(self, routing: Routing, row: int) -> Int[Tensor, " experts_and_tokens"]:
        self._rows.keep(routing, row)
        p = (_normalised(routing).detach().double() * UNIT).round().long()
        tokens = p.new_tensor(p.shape[0]) if routing.mask is None else (routing.mask != 0).sum()
        return torch.cat([p.sum(0), tokens[None]])

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        m = self._excess[self._rows.find(routing)] + 1 / routing.scores.shape[-1]
        p = _mean_normalised(routing)
        return ((m.clamp_min(1 / UNIT).log() + 1).to(p.dtype) * p).sum()

    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        assert statistic is not None
        self._rows.clear()
        sums = torch.stack(list(statistic)).double()
        tokens = sums[:, -1:]
        excess = sums[:, :-1] / (UNIT * tokens.clamp_min(1)) - 1 / load.shape[-1]
        moved = self.memory * self._excess + (1 - self.memory) * excess
        self._excess.copy_(torch.where(tokens > 0, moved, self._excess))


def shinka_loss(routing: Routing, load: Int[Tensor, " experts"]) -> Float[Tensor, ""]:
    """``E sum_e f_e P_e + 0.1 s(P) sum_e max(0, tau - f_e)``, with

        s(P) = 0.5 + (1 - H(P) / log E)     H(P) = -sum_e P_e log P_e
        tau  = 0.064 / E

    f: share of the assignments in ``load``, without gradient; P: mean normalised scores of the unmasked tokens. So the
    second term acts through s(P) only: while any expert has less than 6.4 % of an even share, P is made more even as a
    whole; nothing pulls at that expert itself. 1 at perfect balance; 0 without tokens. The second term is no mean over
    tokens: it depends on how they are cut into calls.

    Source: ShinkaEvolve, arXiv:2509.19349.
    """
    num_experts = routing.scores.shape[-1]
    p = _mean_normalised(routing)
    share = load.to(p.dtype) / load.sum().clamp_min(1).to(p.dtype)
    entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()
    strength = 1.5 - entropy / math.log(num_experts)
    lacking = (0.064 / num_experts - share).clamp_min(0).sum()
    anything = (p.detach().sum() > 0).to(p.dtype)
    return num_experts * (share * p).sum() + 0.1 * strength * lacking * anything


@final
class ShinkaLoss(Balancer):
    """``coefficient * sum over layers of shinka_loss``, f over the global batch.

    Args:
        coefficient: weight of the loss.

    Source: see ``shinka_loss``. Where we differ: layers are summed, as all our losses are.
    """

    name = "shinka"
    metric = "shinka_loss"

    def __init__(self, coefficient: float = 1e-2):
        self.coefficient = check_number("coefficient", coefficient, positive=False)

    def loss(self, routing: Routing, load: Int[Tensor, " experts"] | None) -> Float[Tensor, ""]:
        assert load is not None
        return shinka_loss(routing, load)


# ---- strategies of the lab ----

COMPARED: tuple[type[Balancer], ...] = (ShuffleControl, PhiBalancing, ShinkaLoss)


def parse_lab_strategy(text: str) -> list[Balancer]:
    """As ``parse_strategy``, with the balancers of this file."""
    return parse_strategy(text, more=COMPARED)


def attach_strategy(model: nn.Module, strategy: str, biases: Mapping[str, Tensor] | Path | None = None) -> Balance:
    """``attach`` for a strategy of the lab."""
    balancers: Sequence[Any] = [strategy] if strategy in RECIPES else parse_lab_strategy(strategy)
    return attach(model, *balancers, biases=biases)


def check_strategy(config: Train, num_ranks: int) -> None:
    """Raises UsageError where a strategy of the run does not exist, or cannot be in such a run."""
    for strategy in filter(None, (config.strategy, config.then)):
        if not any(isinstance(balancer, ShuffleControl) for balancer in parse_lab_strategy(strategy)):
            continue
        if num_ranks > 1:
            raise UsageError(
                f"{strategy} must run in one process, which sees every token of a step: got {num_ranks} ranks. Start "
                "it without torchrun."
            )
        if config.order != "forwards_first":
            raise UsageError(
                f"{strategy} must know every token of a step before its backward: got --order {config.order}. Take "
                "forwards_first."
            )
