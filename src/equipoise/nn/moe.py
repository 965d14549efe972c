"""An MoE layer: a router, routed SwiGLU experts, shared experts."""

from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.nn.grouped import sort_by_expert, swiglu, swiglu_experts
from equipoise.nn.router import INIT_STD, Router, check_positive, check_sizes, is_int
from equipoise.routing import ScoreFunction
from equipoise.torch_internals import view_without_base

__all__ = ["MoE"]


class MoE(nn.Module):
    """Routed SwiGLU experts, and shared experts that see every token.

        y_t = sum_{e chosen for t} weight_te * expert_e(x_t) + shared(x_t)
        expert(x) = (silu(g) * u) @ down,  g, u = halves of x @ gate_up

        router.weight    [experts, dim]
        gate_up          [experts, dim, 2 * hidden]
        down             [experts, hidden, dim]
        shared_gate_up   [dim, 2 * shared_hidden]   with shared experts, which together
        shared_down      [shared_hidden, dim]       are one MLP without a router

    The experts compute in autocast's dtype, or else in the dtype of their parameters. The router's weights are rounded
    to that dtype and multiply the inner activations. The outputs of a token's experts are summed in float32 (in float64
    with float64 parameters). The caller adds the residual.

    Dropless by default: every assignment is computed, whatever the load. With ``capacity_factor`` c, an expert takes at
    most ``C = ceil(c * tokens * k / experts)`` assignments of a call, the first ones in token order. A dropped
    assignment adds nothing to its token; the token's other experts keep their weights. Padding takes places too.
    Evaluation drops as training does. A ``Balance`` counts the router's choice, before anything is dropped.

    Args:
        dim: width of a token.
        hidden: inner width of a routed expert.
        num_experts: as for ``Router``, as are ``k``, ``score_function``, ``num_groups``, ``top_groups``,
            ``renormalise`` and ``scale``.
        num_shared: shared experts, 0 or more.
        shared_hidden: inner width of all shared experts together; default ``num_shared * hidden``.
        capacity_factor: finite and positive. Nothing is dropped with None or with c >= experts / k.

    Raises:
        ValueError: sizes that do not fit.

    Attributes:
        num_dropped: assignments that the last forward dropped, int64 scalar, not saved. A recomputation under
            activation checkpointing sets the same number again and adds nothing.

    No shape depends on the data, and the host never waits for a GPU. torch's ``grouped_mm`` computes the products where
    it has a kernel: in bfloat16, and on a CPU also in float32 and float16 unless compiled, for sizes in multiples of 16
    bytes. Elsewhere, as in float64, tokens are laid out in blocks of one expert each: the same result, at most twice
    the arithmetic.

    Source: shared experts as in DeepSeekMoE, arXiv:2401.06066, Eq. 9; capacity as in Switch, arXiv:2101.03961, Eq. 3.
    Where we differ: with k > 1, GShard (arXiv:2006.16668) serves all first choices before any second choice. Here only
    the order of tokens counts.
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
        score_function: ScoreFunction = "sigmoid",
        num_groups: int = 1,
        top_groups: int = 1,
        renormalise: bool | None = None,
        scale: float = 1.0,
        capacity_factor: float | None = None,
    ):
        super().__init__()
        check_sizes(hidden=hidden)
        if not is_int(num_shared) or num_shared < 0:
            raise ValueError(f"num_shared must be an integer, 0 or more: got {num_shared!r}.")
        if shared_hidden is not None:
            check_sizes(shared_hidden=shared_hidden)
            if num_shared == 0:
                raise ValueError(
                    f"shared_hidden must come with shared experts: got shared_hidden={shared_hidden} and num_shared=0. "
                    "Set num_shared, or leave shared_hidden out."
                )
        self.router = Router(
            dim,
            num_experts,
            k,
            score_function=score_function,
            num_groups=num_groups,
            top_groups=top_groups,
            renormalise=renormalise,
            scale=scale,
        )
        self.capacity_factor = capacity_factor
        if capacity_factor is not None:
            check_positive("capacity_factor", capacity_factor)
            # a ratio of integers: in floating point 1.1 * 100 / 10 is slightly above 11 and would round up to 12
            factor = Fraction(capacity_factor)
            ratio = factor.limit_denominator(10**6) or factor  # not 0, however small
            self._capacity_ratio = ratio.as_integer_ratio()
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
        """All weights, the router's too: normal, mean 0, standard deviation 0.02. Bias and ``num_dropped``: 0."""
        self.router.reset_parameters()
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=INIT_STD)
        self.num_dropped.zero_()

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The layer's output for ``hidden``, in its shape and dtype."""
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
        # not a view: FSDP2 warns if a module returns one
        return view_without_base(output.to(hidden.dtype), hidden.shape)

    def capacity(self, num_tokens: int) -> int:
        """The most assignments that an expert takes in a call with ``num_tokens`` tokens."""
        if self.capacity_factor is None:
            return num_tokens
        numerator, denominator = self._capacity_ratio
        return -(-numerator * num_tokens * self.router.k // (denominator * self.router.num_experts))

    def __repr__(self) -> str:
        options = f"hidden={self.hidden}, shared_hidden={self.shared_hidden}, capacity_factor={self.capacity_factor}"
        return f"MoE({options}, {self.router.extra_repr()})"


def _compute_dtype(parameter: Tensor) -> torch.dtype:
    """Autocast's dtype if it is on, else the parameter's."""
    device, dtype = parameter.device.type, parameter.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype  # autocast does not change float64
