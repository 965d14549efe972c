"""Loss-Free Balancing: a bias for the choice of experts, moved after each step against the load."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers.base import (
    Balancer,
    LayerStack,
    check_bool,
    check_choice,
    check_load,
    check_number,
    check_whole,
)

__all__ = ["Frozen", "LossFree"]

RULES = ("sign", "proportional", "rms", "multiplicative", "momentum")
SCHEDULES = ("constant", "linear", "drop")
PAPER_RATE = 1e-3
LARGE_RATE = 0.1  # a step of a tenth of what sigmoid scores may differ by


@final
class LossFree(Balancer):
    """Auxiliary-loss-free balancing: a bias b, moved once a window by the counts c of all its tokens on all ranks.

        error           v_e = (mean(c) - c_e) / mean(c)         1: no token, 0: even, below 0: overloaded
        sign            b_e += rate * sign(v_e)
        proportional    b_e += rate * v_e
        rms             b_e += rate * v_e / sqrt(mean(v^2))
        momentum        m_e <- momentum * m_e + (1 - momentum) * rate * tanh(sharpness * v_e);  b_e += m_e
        multiplicative  w_e += rate * sign(v_e), w = 1 at the start, >= 0; chosen by s_e * w_e instead of s_e + b_e

    so that an overloaded expert becomes harder to choose. No gradient; weights never see b.

    Args:
        rate: step of the bias, in the units of the scores; under ``sign`` b moves by at most ``rate * steps``.
        rule: one of those above; default by the score function: ``sign`` on sigmoid, sqrt_softplus and wherever logits are what
            a bias is added to, ``proportional`` on softmax scores, where 1e-3 can be more than a tenth of a score
            (paper, appendix C).
        center: subtract the mean of the step over the experts, so that b cannot drift; under ``multiplicative`` divide
            w by its mean. The choice does not change by it (what all experts share is invisible to top-k); large
            drifted biases collapse in bfloat16.
        scope: ``global_batch``, or ``micro_batch`` (rule ``sign`` only): the mean of the signs of every micro-batch
            that has tokens, pooled over ranks. The other rules follow the counts smoothly; in equal micro-batches the
            mean of their errors is the error of the whole.
        schedule: of the rate, by number of windows: ``constant``; ``linear`` to zero at window ``zero_from``; ``drop``
            to zero at once there, as DeepSeek-V3 does for its last part.
        zero_from: the first window in which the rate is zero.
        momentum: share of the last step that is kept, from 0 to below 1; default 0.5.
        sharpness: slope of the clamp ``tanh(sharpness * v)``, no unit; default 2.

    State, saved and loaded with the bias: ``momentum``. What is left in it moves b on in windows in which the rate is
    zero, and in those without tokens; under the other rules b then stands still.

    Sources: Wang et al. 2024, arXiv:2408.15664, Algorithm 1 (sign, 1e-3), Table 3 (proportional), Eq. 5 and Table 4
    (multiplicative); Su 2025, kexue.fm/archives/10757 (rms); Arcee Trinity Large, arXiv:2602.17004 (momentum, there
    SMEBU); Moonlight, arXiv:2502.16982, appendix C (center); DeepSeek-V3, arXiv:2412.19437, section 4.2 (drop).
    Where we differ: the first paper does not centre (``center=False`` is the paper) and leaves the unit of the
    proportional error open, ours is the mean load; signs are taken in integers, ``sign(sum(c) - E * c_e)``, so they
    cannot be wrong by rounding; ``micro_batch`` is our reading of "Balance BSZ" for a bias (paper 2, Table 1).

    >>> balancer = LossFree(rate=0.5, rule="sign", center=False)
    >>> balancer.prepare(LayerStack("sigmoid", k=1, bias=torch.zeros(1, 4)))
    >>> balancer.update(torch.tensor([[6, 2, 2, 2]])); balancer.bias()
    tensor([[-0.5000,  0.5000,  0.5000,  0.5000]])
    """

    name = "loss-free"

    def __init__(
        self,
        rate: float = 1e-3,
        rule: str | None = None,
        center: bool = True,
        scope: str = "global_batch",
        schedule: str = "constant",
        zero_from: int | None = None,
        momentum: float | None = None,
        sharpness: float | None = None,
    ):
        self.rate = check_number("rate", rate, positive=True)
        self.rule = rule if rule is None else check_choice("rule", rule, RULES)
        self.multiplies = rule == "multiplicative"
        self.center = check_bool("center", center)
        self.scope = check_choice("scope", scope, ("micro_batch", "global_batch"))
        if scope == "micro_batch" and rule != "sign":
            raise ValueError(f"scope=micro_batch must go with rule=sign: got rule={rule}. Write rule=sign beside it.")
        self.schedule = check_choice("schedule", schedule, SCHEDULES)
        self.zero_from = zero_from if zero_from is None else check_whole("zero_from", zero_from, least=1)
        if (schedule == "constant") != (zero_from is None):
            raise ValueError(
                "zero_from must be given with schedule=linear or schedule=drop, and only with them: got "
                f"schedule={schedule}, zero_from={zero_from}."
            )
        for option, value in (("momentum", momentum), ("sharpness", sharpness)):
            if value is not None and rule != "momentum":
                raise ValueError(f"{option} must go with rule=momentum: got rule={rule}.")
        self.momentum = momentum if momentum is None else check_number("momentum", momentum, positive=False)
        if momentum is not None and momentum >= 1:
            raise ValueError(f"momentum must be below 1: got {momentum!r}.")
        self.sharpness = sharpness if sharpness is None else check_number("sharpness", sharpness, positive=True)

    def prepare(self, layers: LayerStack) -> None:
        self._by_softmax = layers.score_function == "softmax" and layers.selection == "scores"
        self.rule = self.rule or ("proportional" if self._by_softmax else "sign")
        self._bias = layers.bias.clone()
        self._momentum = torch.zeros_like(self._bias) if self.rule == "momentum" else None

    def bias(self) -> Float[Tensor, "layers experts"]:
        return self._bias

    def state(self) -> dict[str, Float[Tensor, "layers experts"]]:
        return {} if self._momentum is None else {"momentum": self._momentum}

    def micro_batch_statistic(self, load: Int[Tensor, "layers experts"]) -> Int[Tensor, "layers numbers"] | None:
        if self.scope != "micro_batch":
            return None
        has_tokens = load.sum(-1, keepdim=True) > 0
        return torch.cat([_error(load).sign(), has_tokens.long()], dim=-1)

    @torch.no_grad()
    def update(
        self, load: Int[Tensor, "layers experts"], statistic: Sequence[Tensor] | None = None, window: int = 0
    ) -> None:
        check_load(load, self._bias)
        step, rate = self._step(load, statistic), self.rate_at(window)
        if rate == 0 and self._momentum is None:
            return
        if self.rule == "multiplicative":
            factor = (1 + self._bias + rate * step).clamp_min(0)  # below 0 the worst score would win
            self._bias.copy_((factor / factor.mean(-1, keepdim=True) if self.center else factor) - 1)
            return
        if self.center:
            step = step - step.mean(-1, keepdim=True)
        if self._momentum is not None:
            kept = 0.5 if self.momentum is None else self.momentum
            self._momentum.mul_(kept).add_(step, alpha=(1 - kept) * rate)
            self._bias.add_(self._momentum)
        else:
            self._bias.add_(step, alpha=rate)

    def _step(self, load: Tensor, statistic: Sequence[Tensor] | None) -> Float[Tensor, "layers experts"]:
        """What the rate is multiplied with, in the bias's dtype."""
        dtype = self._bias.dtype
        if self.scope == "micro_batch":
            if statistic is None:
                raise ValueError("scope=micro_batch must have the signs of the micro-batches: got no statistic.")
            pooled = torch.stack(list(statistic))
            return (pooled[:, :-1].double() / pooled[:, -1:].clamp_min(1)).to(dtype)
        error = _error(load)
        if self.rule in ("sign", "multiplicative"):
            return error.sign_().to(dtype)
        if self.rule == "rms":
            size = error.double().square().mean(-1, keepdim=True).sqrt()
            return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).to(dtype)
        relative = error.double() / load.sum(-1, keepdim=True).clamp_min(1)
        if self.rule == "momentum":
            relative = ((2.0 if self.sharpness is None else self.sharpness) * relative).tanh()
        return relative.to(dtype)

    def rate_at(self, window: int) -> float:
        """The rate after ``window`` windows have ended."""
        if self.zero_from is None:
            return self.rate
        if self.schedule == "linear":
            return self.rate * max(0.0, 1 - window / self.zero_from)
        return self.rate if window < self.zero_from else 0.0

    def notes(self, num_steps: int) -> list[str]:
        softmax = getattr(self, "_by_softmax", False)
        if softmax and self.rule in ("sign", "momentum") and self.rate * self._bias.shape[-1] > 0.1:
            num_experts = self._bias.shape[-1]
            part = f"{self.rate * num_experts:.0%}"
            return [
                f"On softmax scores with {num_experts} experts a step of {self.rate:g} is {part} of a mean score; "
                "rule=proportional follows the size of the error (arXiv:2408.15664, appendix C)."
            ]
        if self.rule in ("proportional", "rms"):
            return []
        moved = [self.rate_at(window) for window in range(num_steps)] if self.zero_from else [self.rate] * num_steps
        way, share = sum(moved), sum(moved) / self.rate
        what = "a factor" if self.rule == "multiplicative" else "a bias"
        reach = f"In {num_steps} steps at rate {self.rate:g} {what} moves by at most {way:.2g}"
        if self.rule == "multiplicative":
            return [f"{reach}, from 1: take more steps or a larger rate."] if way < 0.5 else []
        if softmax:
            return []
        if self.rate > LARGE_RATE:
            return [
                f"At rate {self.rate:g} one step moves a bias by as much, and a sigmoid score lies between 0 and 1: "
                "the load swings from expert to expert. Take a smaller rate."
            ]
        if way < 0.5:
            return [f"{reach}, and a sigmoid score lies between 0 and 1: take more steps or a larger rate."]
        if PAPER_RATE * share < 0.5 and self.rate > PAPER_RATE:
            return [f"{reach}; at the paper's {PAPER_RATE:g} it would be {PAPER_RATE * share:.2g}, too short a way."]
        return []


def _error(load: Int[Tensor, "layers experts"]) -> Int[Tensor, "layers experts"]:
    """``experts * (mean - count)``, exact."""
    return torch.sub(load.sum(-1, keepdim=True), load, alpha=load.shape[-1])


@final
class Frozen(Balancer):
    """Holds the bias that the model came with, or that ``attach(..., biases=...)`` gave, and never moves it.

    Args:
        multiplies: the bias is a factor 1 + bias on the scores, as the rule ``multiplicative`` left it.
    """

    name = "frozen"

    def __init__(self, multiplies: bool = False):
        if not isinstance(multiplies, bool):
            raise ValueError(f"multiplies must be true or false: got {multiplies!r}.")
        self.multiplies = multiplies

    def prepare(self, layers: LayerStack) -> None:
        self._bias = layers.bias.clone()

    def bias(self) -> Float[Tensor, "layers experts"]:
        return self._bias
