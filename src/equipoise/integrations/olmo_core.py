"""OLMo-core's routers."""

from typing import Any

import torch
from torch import Tensor, nn

from equipoise.routers.adapter import OwnBalancing, RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]


class _MoERouter(RouterAdapter):
    """(weights, expert_ids, counts, auxiliary loss); the logits come from a method."""

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
        for option in ("uniform_expert_assignment", "random_expert_assignment"):
            if getattr(router, option, False):
                return f"it ignores its scores: its {option} is on"
        if getattr(router, "jitter_eps", None) is not None:
            return "it adds noise to the tokens: its jitter_eps is set"
        return None

    def own_balancing(self, router: Any, parent: Any) -> OwnBalancing:
        rate, coefficient = getattr(router, "bias_gamma", None), getattr(router, "lb_loss_weight", None)
        loss = f"lb_loss_weight={coefficient}" if coefficient else None
        if not rate:
            return OwnBalancing(loss=loss)

        def stop() -> Any:
            router.bias_gamma = 0.0  # None would leave the bias out of the choice
            return lambda: setattr(router, "bias_gamma", rate)

        return OwnBalancing(f"bias_gamma={rate}", stop, loss)


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {"MoERouter": _MoERouter()}
