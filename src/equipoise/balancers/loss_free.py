"""Loss-Free Balancing: an offset for the choice of experts, moved after each step against the load."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers.base import Balancer, Layers, check_choice, check_load, check_number

__all__ = ["Frozen", "LossFree"]

RULES = ("sign", "proportional")
PAPER_RATE = 1e-3


@final
class LossFree(Balancer):
    """Auxiliary-loss-free balancing. Once a window, from the counts c of all its tokens on all ranks,

        sign            b_e += rate * sign(mean(c) - c_e)
        proportional    b_e += rate * (mean(c) - c_e) / mean(c)

    so that an overloaded expert becomes harder to choose. No gradient; weights never see b.

    Args:
        rate: largest step of the offset (sign) or step at an error of one mean load (proportional), in the units of
            the scores, so b moves by at most ``rate * steps`` under the sign rule. Default 1e-3.
        rule: ``sign`` or ``proportional``; default by the gate: ``sign`` on sigmoid and sqrt_softplus, ``proportional``
            on softmax, where 1e-3 can be more than a tenth of a score (paper, appendix C).
        center: subtract the mean of the step over the experts, so that b cannot drift. The choice does not change by
            it (a common shift of all experts is invisible to top-k); large drifted biases collapse in bfloat16.

    Source: Wang et al. 2024, arXiv:2408.15664, Algorithm 1 (sign, 1e-3) and Table 3 (proportional). Where we differ:
    the paper does not centre (``center=False`` is the paper); it leaves the unit of the proportional error open, ours
    is the mean load; the sign is taken in integers, ``sign(sum(c) - E * c_e)``, so it cannot be wrong by rounding.

    >>> balancer = LossFree(rate=0.5, rule="sign", center=False)
    >>> balancer.prepare(Layers("sigmoid", k=1, offset=torch.zeros(1, 4)))
    >>> balancer.update(torch.tensor([[6, 2, 2, 2]])); balancer.offset()
    tensor([[-0.5000,  0.5000,  0.5000,  0.5000]])
    """

    name = "loss-free"

    def __init__(self, rate: float = 1e-3, rule: str | None = None, center: bool = True):
        self.rate = check_number("rate", rate, positive=True)
        self.rule = rule if rule is None else check_choice("rule", rule, RULES)
        if not isinstance(center, bool):
            raise ValueError(f"center must be true or false: got {center!r}.")
        self.center = center

    def prepare(self, layers: Layers) -> None:
        self.rule = self.rule or ("proportional" if layers.gate == "softmax" else "sign")
        self._offset = layers.offset.clone()

    def offset(self) -> Float[Tensor, "layers experts"]:
        return self._offset

    @torch.no_grad()
    def update(self, load: Int[Tensor, "layers experts"]) -> None:
        check_load(load, self._offset)
        num_experts = load.shape[-1]
        error = load.sum(-1, keepdim=True) - num_experts * load  # num_experts * (mean - count), exact
        if self.rule == "sign":
            step = error.sign().to(self._offset.dtype)
        else:
            step = (error.double() / load.sum(-1, keepdim=True).clamp_min(1)).to(self._offset.dtype)
        if self.center:
            step = step - step.mean(-1, keepdim=True)
        self._offset.add_(step, alpha=self.rate)

    def notes(self, num_steps: int) -> list[str]:
        if self.rule == "proportional":
            return []
        reach = f"In {num_steps} steps at rate {self.rate:g} an offset moves by at most {self.rate * num_steps:.2g}"
        if self.rate * num_steps < 0.5:
            return [f"{reach}, and a sigmoid score lies between 0 and 1: take more steps or a larger rate."]
        if PAPER_RATE * num_steps < 0.5 and self.rate > PAPER_RATE:
            return [
                f"{reach}; at the paper's {PAPER_RATE:g} it would be {PAPER_RATE * num_steps:.2g}, too short a way."
            ]
        return []


@final
class Frozen(Balancer):
    """Holds the offset that the model came with, or that ``attach(..., offsets=...)`` gave, and never moves it."""

    name = "frozen"

    def prepare(self, layers: Layers) -> None:
        self._offset = layers.offset.clone()

    def offset(self) -> Float[Tensor, "layers experts"]:
        return self._offset
