"""Megatron-Core's routers."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.routers.adapter import OwnBalancing, RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]

# Options of its config under which the choice is another than the best by score and bias, or cannot be seen.
_REFUSED = {
    "moe_expert_capacity_factor": "drops tokens after the choice, which its output then does not show",
    "moe_router_force_load_balancing": "replaces the logits by random numbers",
    "moe_router_force_biased": "adds random numbers to the logits",
    "moe_input_jitter_eps": "adds noise to the tokens",
    "moe_enable_routing_replay": "replays a recorded choice",
    "moe_router_fusion": "chooses in a kernel of Transformer Engine, which cannot be tried on a CPU",
}


class _TopKRouter(RouterAdapter):
    """(weights [tokens, experts], which experts are chosen [tokens, experts]); tokens stand [sequence, batch]."""

    framework = "megatron-core 0.19.2"
    is_sequence_first = True
    logits_returned_by = "gating"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        weights, is_chosen = output
        assert logits is not None
        if k is None:
            k = int(is_chosen.sum(-1).max())
        expert_ids = is_chosen.to(torch.uint8).topk(k, dim=-1).indices
        return logits.reshape(-1, logits.shape[-1]), weights.gather(-1, expert_ids), expert_ids

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return torch.zeros_like(output[0]).scatter(-1, expert_ids, weights), output[1]

    def mask(self, arguments: Mapping[str, Any]) -> Tensor | None:
        is_padding = arguments.get("padding_mask")  # [sequence, batch]; its docstrings say the opposite of its code
        return None if is_padding is None else ~is_padding.bool().T

    def prepare(self, stand_in: Any) -> None:
        def gating(self: Any, tokens: Tensor) -> Tensor:  # its own moves the weights to a GPU
            return nn.functional.linear(tokens, self.weight, self.bias)

        stand_in.__dict__["gating"] = MethodType(gating, stand_in)

    def refusal(self, router: Any) -> str | None:
        config = router.config
        for option, reason in _REFUSED.items():
            if getattr(config, option, None):
                return f"{option} of its config {reason}"
        kind = config.moe_router_load_balancing_type
        if kind in ("sinkhorn", "quantile_balancing"):
            return f"moe_router_load_balancing_type={kind!r} of its config chooses by more than scores and a bias"
        return None

    def own_balancing(self, router: Any, parent: Any) -> OwnBalancing:
        config = router.config
        update, stop = None, None
        if getattr(router, "expert_bias", None) is not None and not getattr(router, "frozen_expert_bias", False):
            update = f"moe_router_bias_update_rate={config.moe_router_bias_update_rate}"

            def stop() -> Any:
                # The second switches its counting off, which fails under a padding mask. The bias goes on steering.
                router.frozen_expert_bias, router.enable_expert_bias = True, False

                def resume() -> None:
                    router.frozen_expert_bias, router.enable_expert_bias = False, True

                return resume

        loss = router.is_aux_loss_enabled() if hasattr(router, "is_aux_loss_enabled") else False
        return OwnBalancing(update, stop, f"moe_aux_loss_coeff={config.moe_aux_loss_coeff}" if loss else None)


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {"TopKRouter": _TopKRouter()}
