"""OLMo-core's routers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import OwnBalancing, RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]

# Options of a router under which its choice is another than the best by score and bias.
_REFUSED = {
    "uniform_expert_assignment": "it ignores its scores",
    "random_expert_assignment": "it ignores its scores",
    "jitter_eps": "it adds noise to the tokens",
    "use_recompute_cache": "it replays a recorded choice",
}


class _MoERouter(RouterAdapter):
    """(weights, expert_ids, counts, auxiliary loss), all [batch, sequence, ...]; the logits come from a method."""

    framework = "ai2-olmo-core 3.0.0"
    logits_returned_by = "get_expert_logits"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        assert logits is not None
        return logits, output[0], output[1]

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return weights.view(output[0].shape), *output[1:]

    def width(self, router: Any) -> int | None:
        return int(router.d_model)

    def prepare(self, stand_in: Any) -> None:
        weight: Any = stand_in.weight  # flat, so it is not known as a matrix
        random = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        stand_in.weight = nn.Parameter(random, requires_grad=False)

    def refusal(self, router: Any) -> str | None:
        for option, reason in _REFUSED.items():
            if getattr(router, option, None):
                return f"{reason}: its {option} is on"
        return None

    def own_balancing(self, router: Any, parent: Any) -> OwnBalancing:
        rate = router.bias_gamma
        losses = {name: getattr(router, name) for name in ("lb_loss_weight", "z_loss_weight")}
        loss, z_loss = (f"{name}={value}" if value else None for name, value in losses.items())
        if not rate:
            return OwnBalancing(loss=loss, z_loss=z_loss)

        def stop() -> Any:
            router.bias_gamma = 0.0  # None would leave the bias out of the choice
            return lambda: setattr(router, "bias_gamma", rate)

        return OwnBalancing(f"bias_gamma={rate}", stop, loss, z_loss)


class _MoERouterV2(_MoERouter):
    """The same, called with ``scores_only``: with True it chooses nothing, and gives the scores of all experts."""

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        if output[1] is None:
            raise EquipoiseError(
                "a router must choose experts: a MoERouterV2 was called with scores_only=True, as one of shared "
                "experts is. Leave it out: attach(..., where=lambda name, router: 'shared' not in name)."
            )
        return super().read(output, logits, k)

    def arguments(self, num_tokens: int) -> Mapping[str, Any]:
        return {"scores_only": False}


class _EmoRouterV2(_MoERouterV2):
    """Draws a pool of experts for each document, and chooses from it."""

    def refusal(self, router: Any) -> str | None:
        return "it chooses from a pool of experts that it draws for each document (EMO)"


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {
    "MoERouter": _MoERouter(),
    "MoERouterV2": _MoERouterV2(),
    "EmoRouterV2": _EmoRouterV2(),
}
