"""NeMo Automodel's routers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.routers.adapter import OwnBalancing, RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]


class _Gate(RouterAdapter):
    """(weights [tokens, k], expert_ids [tokens, k], auxiliary loss), called with a mask of the tokens."""

    framework = "nemo-automodel 0.7.0"
    logits_passed_to = "_route_scores"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        assert logits is not None
        return logits, output[0], output[1]

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return weights, *output[1:]

    def arguments(self, num_tokens: int) -> Mapping[str, Any]:
        return {"token_mask": torch.ones(num_tokens, dtype=torch.bool, device="cpu"), "cp_mesh": None}

    def mask(self, arguments: Mapping[str, Any]) -> Tensor | None:
        return arguments.get("token_mask")

    def refusal(self, router: Any) -> str | None:
        if getattr(router, "router_replay", None) is not None:
            return "it replays a recorded choice: enable_routing_replay is on"
        if getattr(router, "use_routing_core", False):
            return "it routes by a compiled core, which does not show its logits: use_routing_core is on"
        return None

    def own_balancing(self, router: Any, parent: Any) -> OwnBalancing:
        rate, coefficient = router.bias_update_factor, router.aux_loss_coeff
        loss = f"aux_loss_coeff={coefficient}" if coefficient else None
        if not rate:
            return OwnBalancing(loss=loss)

        def stop() -> Any:
            router.bias_update_factor = 0.0
            return lambda: setattr(router, "bias_update_factor", rate)

        return OwnBalancing(f"gate_bias_update_factor={rate}", stop, loss)


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {"Gate": _Gate()}
