"""A router: the gate of an MoE layer and the choice of experts."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.routers.kind import RouterKind
from equipoise.routing import ScoreFunction, route, without_autocast

__all__ = ["Router"]

INIT_STD = 0.02  # the initializer range of Transformers' MoE families


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        if not is_int(value) or value < 1:
            raise ValueError(f"{name} must be an integer, 1 or more: got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    if not (is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite positive number: got {value!r}.")


class Router(nn.Module):
    """Chooses k experts per token: ``route`` on the logits of a linear gate.

        logits                = hidden @ weight.T   float32 even under autocast; float64 stays
        weights, expert_ids   = route(logits, k, bias=e_score_correction_bias, ...)

    ``hidden [..., dim]`` is flattened to tokens; ``weight`` is ``[experts, dim]``. ``e_score_correction_bias
    [experts]`` is the slot for a balancer's bias, under the name that it has in DeepSeek-V3, GLM and Kimi. It starts at
    zero, is saved with the model, and stays float32 when the model is cast. It moves the choice, never the weights, and
    has no gradient.

    Args:
        dim: width of a token.
        num_experts: experts to choose from.
        k: experts per token.
        score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus``; see ``score``.
        num_groups: expert groups of equal size; 1 switches group-limited routing off.
        top_groups: how many of them are open to a token.
        renormalise: divide the weights by their sum over the chosen experts. None: if k > 1.
        scale: factor on the weights, finite and positive.

    Raises:
        ValueError: sizes that do not fit, or ``renormalise=True`` with k = 1: no gradient from the task.

    Source: gate and slot as in DeepSeek-V3, arXiv:2412.19437, Eqs. 13-16. Where we differ: float32 logits for every
    score function, and no 1e-20 added to the sum of the weights.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        score_function: ScoreFunction = "sigmoid",
        num_groups: int = 1,
        top_groups: int = 1,
        renormalise: bool | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        check_sizes(dim=dim, num_experts=num_experts, k=k, num_groups=num_groups, top_groups=top_groups)
        logits = torch.zeros(1, num_experts, device="cpu")  # route checks the score function, the expert groups and k
        route(logits, k, score_function=score_function, num_groups=num_groups, top_groups=top_groups)
        if renormalise and k == 1:
            raise ValueError(
                "renormalise must be False with k=1: the only weight would be the constant scale, and the router would "
                "get no gradient from the task. Leave renormalise out."
            )
        check_positive("scale", scale)
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.score_function: ScoreFunction = score_function
        self.num_groups, self.top_groups = num_groups, top_groups
        self.renormalise = k > 1 if renormalise is None else bool(renormalise)
        self.scale = float(scale)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("e_score_correction_bias", torch.empty(num_experts, dtype=torch.float32))
        self.reset_parameters()

    @property
    def router_kind(self) -> RouterKind:
        """What ``attach`` proves it to be."""
        return RouterKind(self.score_function, "e_score_correction_bias")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weight: normal, mean 0, standard deviation 0.02; bias: 0."""
        nn.init.normal_(self.weight, std=INIT_STD)
        self.e_score_correction_bias.zero_()

    def forward(
        self, hidden: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """``(logits, weights, expert_ids)`` of the tokens in ``hidden``, flattened."""
        if hidden.shape[-1:] != (self.dim,):
            raise ValueError(
                f"hidden must have the shape (..., {self.dim}): got {tuple(hidden.shape)}. Build the layer with "
                "dim=hidden.shape[-1]."
            )
        if not hidden.is_floating_point():
            raise ValueError(f"hidden must hold floating point numbers: got {hidden.dtype}.")
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)
        with without_autocast(hidden.device):
            logits = F.linear(hidden.reshape(-1, self.dim).to(dtype), self.weight.to(dtype))
            routing = route(
                logits,
                self.k,
                score_function=self.score_function,
                bias=self.e_score_correction_bias,
                num_groups=self.num_groups,
                top_groups=self.top_groups,
                renormalise=self.renormalise,
                scale=self.scale,
            )
        return logits, routing.weights, routing.expert_ids

    def extra_repr(self) -> str:
        names = ("dim", "num_experts", "k", "score_function", "num_groups", "top_groups", "renormalise")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names) + f", scale={self.scale:g}"

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != before.dtype and before.dtype == torch.float32:  # a cast: the bias stays float32
            self._buffers["e_score_correction_bias"] = before.to(after.device)
        return self
