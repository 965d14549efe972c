"""A router and a mixture-of-experts layer for those who write their own model; ``attach`` knows them.

A model and its training in one's own loop:

    import torch
    from torch import nn

    import equipoise
    from equipoise.nn import MoE

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm, self.moe = nn.RMSNorm(dim), MoE(dim, hidden=32, num_experts=8, k=2, num_shared=1)

        def forward(self, x):
            return x + self.moe(self.norm(x))

    model = nn.Sequential(nn.Embedding(256, 64), Block(64), Block(64), nn.Linear(64, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    balance = equipoise.attach(model, equipoise.LossFree(), equipoise.LoadBalancingLoss(1e-4, scope="sequence"))
    for ids in torch.randint(256, (3, 4, 33)):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        (loss + balance.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
"""

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.grouped import sort_by_expert, swiglu, swiglu_experts
from equipoise.routing import route
from equipoise.taps.tap import RouterKind

__all__ = ["MoE", "Router"]

INIT_STD = 0.02  # the initializer range of Transformers' MoE families


class Router(nn.Module):
    """Chooses k experts a token: ``route`` on the logits of a linear gate without bias.

        logits                = hidden @ weight.T                   float32, whatever autocast says; float64 stays
        weights, expert_ids   = route(logits, k, offset=e_score_correction_bias, ...)

    ``e_score_correction_bias`` [experts] is the slot of a balancer's offset, by the name that DeepSeek-V3, GLM and Kimi
    give it: zeros, saved with the model, float32 also when the model is cast. It moves the choice, never the weights,
    and has no gradient.

    Args:
        dim: width of a token.
        num_experts, k: experts to choose from, and how many a token gets.
        gate: ``softmax``, ``sigmoid`` or ``sqrt_softplus``; see ``score``.
        num_groups, top_groups: group-limited routing; 1 and 1 switch it off.
        renormalise: divide the weights by their sum over the chosen experts. None: where k > 1.
        scale: factor on the weights, finite and positive.

    Raises ``ValueError`` for sizes that do not fit, and for ``renormalise=True`` with k = 1: the only weight would be
    the constant ``scale``, and the router would get no gradient from the task.

    Source: gate and slot as in DeepSeek-V3, arXiv:2412.19437, Eqs. 13-16. Where we differ: float32 logits for every
    gate, no 1e-20 beside the sum of the weights.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        gate: str = "sigmoid",
        num_groups: int = 1,
        top_groups: int = 1,
        renormalise: bool | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        _check_sizes(dim=dim, num_experts=num_experts, k=k, num_groups=num_groups, top_groups=top_groups)
        route(  # its own checks of gate, groups and k
            torch.zeros(1, num_experts, device="cpu"), k, gate=gate, num_groups=num_groups, top_groups=top_groups
        )
        if renormalise and k == 1:
            raise ValueError(
                "renormalise must be False with k=1: the only weight would be the constant scale, and the router would "
                "get no gradient from the task. Leave renormalise out."
            )
        _check_positive("scale", scale)
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.gate, self.num_groups, self.top_groups = gate, num_groups, top_groups
        self.renormalise = k > 1 if renormalise is None else bool(renormalise)
        self.scale = float(scale)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("e_score_correction_bias", torch.empty(num_experts, dtype=torch.float32))
        self.reset_parameters()

    @property
    def router_kind(self) -> RouterKind:
        return RouterKind(self.gate, "e_score_correction_bias")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weight: normal, mean 0, standard deviation 0.02; offset: 0."""
        nn.init.normal_(self.weight, std=INIT_STD)
        self.e_score_correction_bias.zero_()

    def forward(
        self, hidden: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """(logits, weights, expert_ids) of the flattened tokens."""
        if hidden.shape[-1:] != (self.dim,):
            raise ValueError(
                f"hidden must have the router's dim last: expected (..., {self.dim}), got {tuple(hidden.shape)}. Build "
                "the layer with dim=hidden.shape[-1]."
            )
        if not hidden.is_floating_point():
            raise ValueError(f"hidden must hold floating point numbers: got {hidden.dtype}.")
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)
        device = hidden.device.type
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            logits = F.linear(hidden.reshape(-1, self.dim).to(dtype), self.weight.to(dtype))
            routing = route(
                logits,
                self.k,
                gate=self.gate,
                offset=self.e_score_correction_bias,
                num_groups=self.num_groups,
                top_groups=self.top_groups,
                renormalise=self.renormalise,
                scale=self.scale,
            )
        return logits, routing.weights, routing.expert_ids

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, gate={self.gate!r}, "
            f"num_groups={self.num_groups}, top_groups={self.top_groups}, renormalise={self.renormalise}, "
            f"scale={self.scale:g}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != before.dtype and before.dtype == torch.float32:  # a cast: the choice keeps its offset
            self._buffers["e_score_correction_bias"] = before.to(after.device)
        return self


class MoE(nn.Module):
    """Routed SwiGLU experts, and shared ones that see every token; hidden [..., dim] -> the same shape and dtype.

        y_t = sum_{e chosen for t} weight_te * expert_e(x_t) + shared(x_t)
        expert(x) = (silu(g) * u) @ down,  g, u = halves of x @ gate_up

    Parameters: ``router.weight`` [experts, dim]; ``gate_up`` [experts, dim, 2 * hidden] and ``down`` [experts, hidden,
    dim]; ``shared_gate_up`` [dim, 2 * shared_hidden] and ``shared_down`` [shared_hidden, dim] where there are shared
    experts: one MLP, without a gate.

    The experts compute in autocast's dtype, else in their parameters'. The router's weights, rounded to that dtype,
    multiply the inner activations; the outputs of a token's experts are summed in float32 (float64 with float64
    parameters).

    Dropless by default: every assignment is computed, whatever the load. With ``capacity_factor`` c an expert takes at
    most ``C = ceil(c * tokens * k / experts)`` assignments of a call, the first ones in token order; a later one adds
    nothing to its token, whose other experts serve it with unchanged weights. Padding takes places too, and so it is in
    evaluation. What a ``Balance`` counts is the router's choice, before anything is dropped.

    Args:
        dim: width of a token.
        hidden: inner width of a routed expert.
        num_experts, k, gate, num_groups, top_groups, renormalise, scale: see ``Router``.
        num_shared: shared experts, 0 or more.
        shared_hidden: inner width of all shared experts together; default ``num_shared * hidden``.
        capacity_factor: finite and positive; None drops nothing. With c >= experts / k nothing is dropped either.

    Attributes:
        num_dropped: assignments that the last forward dropped, int64 scalar, not saved. A recomputation under
            activation checkpointing is a forward too: it sets the same number anew, and adds nothing.

    No shape depends on the data and the host never waits for a GPU. ``grouped_mm`` does the products where torch has a
    kernel for them: bfloat16; on a CPU also float32 and float16 unless compiled; sizes in multiples of 16 bytes.
    Elsewhere (float64) tokens are laid out in blocks of one expert each, with the same result and at most twice the
    arithmetic.

    Source: shared experts as in DeepSeekMoE, arXiv:2401.06066, Eq. 9; capacity as in Switch, arXiv:2101.03961, Eq. 3.
    Where we differ: with k > 1, GShard (arXiv:2006.16668) serves all first choices before any second one; here only the
    order of tokens counts. The residual is the caller's.
    """

    num_dropped: Tensor

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        num_shared: int = 0,
        shared_hidden: int | None = None,
        gate: str = "sigmoid",
        num_groups: int = 1,
        top_groups: int = 1,
        renormalise: bool | None = None,
        scale: float = 1.0,
        capacity_factor: float | None = None,
    ):
        super().__init__()
        _check_sizes(hidden=hidden)
        if not _is_int(num_shared) or num_shared < 0:
            raise ValueError(f"num_shared must be an integer, 0 or more: got {num_shared!r}.")
        if shared_hidden is not None:
            _check_sizes(shared_hidden=shared_hidden)
            if num_shared == 0:
                raise ValueError(
                    f"shared_hidden must come with shared experts: got shared_hidden={shared_hidden} and num_shared=0. "
                    "Set num_shared, or leave shared_hidden out."
                )
        self.router = Router(
            dim,
            num_experts,
            k,
            gate=gate,
            num_groups=num_groups,
            top_groups=top_groups,
            renormalise=renormalise,
            scale=scale,
        )
        self.capacity_factor = capacity_factor
        if capacity_factor is not None:
            _check_positive("capacity_factor", capacity_factor)
            # a ratio of integers: 1.1 * 100 / 10 is a little over 11 in binary, and would be rounded up to 12
            self._capacity_ratio = Fraction(capacity_factor).limit_denominator(10**6).as_integer_ratio()
        self.dim, self.hidden = dim, hidden
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.shared_hidden = num_shared * hidden if shared_hidden is None else shared_hidden
        if self.shared_hidden:
            self.shared_gate_up = nn.Parameter(torch.empty(dim, 2 * self.shared_hidden))
            self.shared_down = nn.Parameter(torch.empty(self.shared_hidden, dim))
        self.register_buffer("num_dropped", torch.empty((), dtype=torch.int64), persistent=False)
        self._reset()

    def reset_parameters(self) -> None:
        """Every weight: normal, mean 0, standard deviation 0.02; the router's too. Offset and ``num_dropped``: 0."""
        self.router.reset_parameters()
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=INIT_STD)
        self.num_dropped.zero_()

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        _, weights, expert_ids = self.router(hidden)
        x = hidden.reshape(-1, self.dim).to(_compute_dtype(self.gate_up))
        assignments = sort_by_expert(expert_ids, self.router.num_experts)
        if self.capacity_factor is not None:
            place = assignments.inverse.view_as(expert_ids) - assignments.begins[expert_ids]  # within its expert
            dropped = place >= self.capacity(len(expert_ids))
            weights = weights.masked_fill(dropped, 0)
            self.num_dropped.copy_(dropped.sum())
        output = swiglu_experts(x, weights, assignments, self.gate_up, self.down)
        if self.shared_hidden:
            output = output + swiglu(x @ self.shared_gate_up.to(x.dtype)) @ self.shared_down.to(x.dtype)
        # of the input's shape without being a view, of which FSDP2 warns
        return torch.ops.aten._unsafe_view(output.to(hidden.dtype), hidden.shape)

    def capacity(self, num_tokens: int) -> int:
        """The most assignments that an expert takes of a call with this many tokens; an expert cannot get more than
        ``num_tokens``."""
        if self.capacity_factor is None:
            return num_tokens
        numerator, denominator = self._capacity_ratio
        return -(-numerator * num_tokens * self.router.k // (denominator * self.router.num_experts))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden={self.hidden}, shared_hidden={self.shared_hidden}, "
            f"capacity_factor={self.capacity_factor}"
        )


def _compute_dtype(parameter: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the parameter's."""
    device, dtype = parameter.device.type, parameter.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype  # autocast leaves float64 alone


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        if not _is_int(value) or value < 1:
            raise ValueError(f"{name} must be an integer, 1 or more: got {value!r}.")


def _check_positive(name: str, value: Any) -> None:
    if not (_is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite positive number: got {value!r}.")
