"""Loss-Free Balancing: a bias for the choice of experts that moves against the load after each step.

To add a rule, write its step, give it a row in ``RULES``, and add its name to ``Rule`` and to ``LossFree``'s docstring.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers.base import (
    Balancer,
    LayerStack,
    Load,
    check_bool,
    check_load,
    check_number,
    check_whole,
)
from equipoise.errors import check_choice
from equipoise.routing import widest_float

__all__ = ["RULES", "Frozen", "LossFree", "Rule", "Schedule"]

Rule = Literal["sign", "proportional", "rms", "multiplicative", "momentum"]
Schedule = Literal["constant", "linear", "drop"]
Step = Float[Tensor, "layers experts"]

LARGE_RATE = 0.1  # a tenth of the range of a sigmoid score


def _error(load: Load) -> Int[Tensor, "layers experts"]:
    """``experts * (mean(c) - c_e)``: in integers, so it is exact and no rounding can turn its sign."""
    return torch.sub(load.sum(-1, keepdim=True), load, alpha=load.shape[-1])


def sign_step(load: Load) -> Int[Tensor, "layers experts"]:
    return _error(load).sign_()


def proportional_step(load: Load) -> Step:
    return _error(load).to(widest_float(load.device)) / load.sum(-1, keepdim=True).clamp_min(1)  # 0 without tokens


def rms_step(load: Load) -> Step:
    error = _error(load).to(widest_float(load.device))
    size = error.square().mean(-1, keepdim=True).sqrt()
    return error / size.clamp_min(torch.finfo(size.dtype).tiny)  # 0 at balance


def clamped_step(load: Load, sharpness: float = 2.0) -> Step:
    return (sharpness * proportional_step(load)).tanh()


class _Rule(NamedTuple):
    step: Callable[..., Tensor]  # of the load; the rate multiplies it
    is_bounded: bool  # no step is larger than the rate, before centring
    multiplies: bool = False  # the bias is a factor: w = 1 + b
    has_momentum: bool = False  # the bias moves by a running mean of the steps


RULES: Mapping[Rule, _Rule] = {
    "sign": _Rule(sign_step, is_bounded=True),
    "proportional": _Rule(proportional_step, is_bounded=False),
    "rms": _Rule(rms_step, is_bounded=False),
    "multiplicative": _Rule(sign_step, is_bounded=True, multiplies=True),
    "momentum": _Rule(clamped_step, is_bounded=True, has_momentum=True),
}


@final
class LossFree(Balancer):
    """Auxiliary-loss-free balancing: a bias b that moves once per window by the counts c of its tokens on all ranks.

        error           v_e = (mean(c) - c_e) / mean(c)
                        1: no token, 0: even, below 0: overloaded
        sign            b_e += rate * sign(v_e)
        proportional    b_e += rate * v_e
        rms             b_e += rate * v_e / sqrt(mean(v^2))
        momentum        m_e <- momentum * m_e + (1 - momentum) * rate * tanh(sharpness * v_e)
                        b_e += m_e
        multiplicative  w_e += rate * sign(v_e), w = 1 at the start, >= 0
                        chosen by s_e * w_e instead of s_e + b_e

    An overloaded expert becomes harder to choose. The bias has no gradient, and the weights never see it.

    Args:
        rate: step of the bias, in the units of the scores. Under ``sign`` b moves by at most ``rate * steps``,
            with centring by less than twice as much.
        rule: the formula of the step. One of those above; the default is ``proportional`` where the bias is added to
            softmax scores, because there 1e-3 can be more than a tenth of a score (paper, appendix C). Elsewhere, also
            on logits, it is ``sign``.
        center: subtract the step's mean over the experts, so b cannot drift; ``multiplicative``: divide w by its mean.
            Top-k does not see what all experts share, but large drifted biases lose their differences in bfloat16.
        scope: whose counts are taken: ``global_batch``, or with rule ``sign`` also ``micro_batch``, the mean of the
            signs of all micro-batches that have tokens, over all ranks. The other rules follow the counts smoothly: in
            micro-batches of equal size the mean of their errors is the error of the whole.
        schedule: the rate by number of windows: ``constant``; ``linear``, to zero at window ``zero_from``; ``drop``, to
            zero at once there, as DeepSeek-V3 does for its last part.
        zero_from: the window from which the rate is zero, with ``linear`` and ``drop``, and only with them. From 1 on.
        momentum: of rule ``momentum``, 0.5 if not given. From 0 to below 1. m is saved with b and moves it even in a
            window without tokens or with rate zero; the other rules then leave b alone.
        sharpness: of rule ``momentum``, 2 if not given. Above 0.

    Raises:
        ValueError: a value is not allowed, or an option is given without the rule or the schedule that it belongs to.

    Sources: Wang et al. 2024, arXiv:2408.15664, Algorithm 1 (sign, 1e-3), Table 3 (proportional), Eq. 5 and Table 4
    (multiplicative); Su 2025, kexue.fm/archives/10757 (rms); Arcee Trinity Large, arXiv:2602.17004 (momentum, there
    SMEBU); Moonlight, arXiv:2502.16982, appendix C (center); DeepSeek-V3, arXiv:2412.19437, section 4.2 (drop).

    Where we differ: the first paper does not centre (``center=False``). It leaves the unit of the proportional error
    open; ours is the mean load. ``micro_batch`` is how we read "Balance BSZ" (paper 2, arXiv:2501.11873, Table 1).

    Examples:
        >>> balancer = LossFree(rate=0.5, rule="sign", center=False)
        >>> balancer.prepare(LayerStack("sigmoid", k=1, bias=torch.zeros(1, 4)))
        >>> balancer.update(torch.tensor([[6, 2, 2, 2]])); balancer.bias()
        tensor([[-0.5000,  0.5000,  0.5000,  0.5000]])
    """

    name = "loss-free"

    def __init__(
        self,
        rate: float = 1e-3,
        rule: Rule | None = None,
        center: bool = True,
        scope: Literal["micro_batch", "global_batch"] = "global_batch",
        schedule: Schedule = "constant",
        zero_from: int | None = None,
        momentum: float | None = None,
        sharpness: float | None = None,
    ):
        self.rate = check_number("rate", rate, positive=True)
        self.rule = rule if rule is None else check_choice("rule", rule, tuple(RULES))
        self.multiplies = rule is not None and RULES[rule].multiplies
        self.center = check_bool("center", center)
        self.scope = check_choice("scope", scope, ("micro_batch", "global_batch"))
        if scope == "micro_batch" and rule != "sign":
            raise ValueError(f"scope=micro_batch must go with rule=sign: got rule={rule}. Write rule=sign beside it.")
        self.schedule = check_choice("schedule", schedule, get_args(Schedule))
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
        self._by_sigmoid = layers.score_function == "sigmoid" and layers.selection == "scores"
        self.rule = self.rule or ("proportional" if self._by_softmax else "sign")
        self._bias = layers.bias.clone()
        self._momentum = torch.zeros_like(self._bias) if RULES[self.rule].has_momentum else None

    def bias(self) -> Float[Tensor, "layers experts"]:
        return self._bias

    def state(self) -> dict[str, Float[Tensor, "layers experts"]]:
        return {} if self._momentum is None else {"momentum": self._momentum}

    def micro_batch_statistic(self, load: Load) -> Int[Tensor, "layers numbers"] | None:
        if self.scope != "micro_batch":
            return None
        has_tokens = load.sum(-1, keepdim=True) > 0
        return torch.cat([sign_step(load), has_tokens.long()], dim=-1)

    @torch.no_grad()
    def update(self, load: Load, statistic: Sequence[Tensor] | None = None, window: int = 0) -> None:
        check_load(load, self._bias)
        step, rate = self._step(load, statistic), self.rate_at(window)
        if rate == 0 and self._momentum is None:
            return
        if self.multiplies:
            factor = (1 + self._bias + rate * step).clamp_min(0)  # below 0 the worst score would win
            self._bias.copy_((factor / factor.mean(-1, keepdim=True) if self.center else factor) - 1)
            return
        if self.center:
            step.sub_(step.mean(-1, keepdim=True))
        if self._momentum is not None:
            decay = 0.5 if self.momentum is None else self.momentum
            self._momentum.mul_(decay).add_(step, alpha=(1 - decay) * rate)
            self._bias.add_(self._momentum)
        else:
            self._bias.add_(step, alpha=rate)

    def _step(self, load: Load, statistic: Sequence[Tensor] | None) -> Step:
        if self.scope == "micro_batch":
            if statistic is None:
                raise ValueError("scope=micro_batch must have the signs of the micro-batches: got no statistic.")
            signs = torch.stack(list(statistic))  # the last column counts the micro-batches with tokens
            return (signs[:, :-1].to(widest_float(signs.device)) / signs[:, -1:].clamp_min(1)).to(self._bias.dtype)
        assert self.rule is not None
        options = {} if self.sharpness is None else {"sharpness": self.sharpness}
        return RULES[self.rule].step(load, **options).to(self._bias.dtype)

    def rate_at(self, window: int) -> float:
        """The rate of the schedule in window ``window``, counted from 0."""
        if self.zero_from is None:
            return self.rate
        if self.schedule == "linear":
            return self.rate * max(0.0, 1 - window / self.zero_from)
        return self.rate if window < self.zero_from else 0.0

    def notes(self, num_steps: int) -> list[str]:
        rule, by_softmax = RULES[self.rule or "sign"], getattr(self, "_by_softmax", False)
        if not rule.is_bounded:
            return []
        if by_softmax and not rule.multiplies:
            num_experts = self._bias.shape[-1]
            share = self.rate * num_experts
            if share <= 0.1:
                return []
            return [
                f"On softmax scores with {num_experts} experts a step of {self.rate:g} is {share:.0%} of a mean score; "
                "rule=proportional follows the size of the error (arXiv:2408.15664, appendix C)."
            ]
        reach = sum(self.rate_at(window) for window in range(num_steps))
        moved = "a factor" if rule.multiplies else "a bias"
        text = f"In {num_steps} steps at rate {self.rate:g} {moved} moves by at most {reach:.2g}"
        if rule.multiplies:
            return [f"{text}, from 1: take more steps or a larger rate."] if reach < 0.5 else []
        if not getattr(self, "_by_sigmoid", True):
            return []  # what a bias is added to has no known range
        text += " before centring" if self.center else ""
        if self.rate > LARGE_RATE:
            return [
                f"At rate {self.rate:g} one step moves a bias by as much, and a sigmoid score lies between 0 and 1: "
                "the load swings from expert to expert. Take a smaller rate."
            ]
        if reach < 0.5:
            rate = max(1e-3, 1 / max(num_steps, 1))
            remedy = f"take {rate:.2g}" if self.schedule == "constant" else "take more steps or a larger rate"
            return [f"{text}, and a sigmoid score lies between 0 and 1: {remedy}."]
        return []


@final
class Frozen(Balancer):
    """Holds the bias that the model came with, or that ``attach(..., biases=...)`` set, and never moves it.

    Args:
        multiplies: whether the bias is a factor ``1 + bias`` on the scores, as from the rule ``multiplicative``.
    """

    name = "frozen"

    def __init__(self, multiplies: bool = False):
        self.multiplies = check_bool("multiplies", multiplies)

    def prepare(self, layers: LayerStack) -> None:
        self._bias = layers.bias.clone()

    def bias(self) -> Float[Tensor, "layers experts"]:
        return self._bias
