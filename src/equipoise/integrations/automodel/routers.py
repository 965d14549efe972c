"""NeMo Automodel's routers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import OwnBalancing, RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]


class _Gate(RouterAdapter):
    """(weights [tokens, k], expert_ids [tokens, k], auxiliary loss), called with a mask of the tokens."""

    framework = "nemo-automodel 0.7.0"
    logits_passed_to = "_route_scores"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        if logits is None:
            raise EquipoiseError(
                "a Gate must route by its method _route_scores, which takes its logits: in this call it did not. Leave "
                "moe_router out of backend.cuda_graph.modules."
            )
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
        if router.use_routing_core:
            return "it routes in a CUDA graph, which does not show its logits: moe_router is in backend.cuda_graph"
        has_bias_in_weights = router.router_weight_uses_score_correction_bias and router.score_func == "sigmoid"
        if has_bias_in_weights and router.e_score_correction_bias is not None:
            return "its weights contain the bias: router_weight_uses_score_correction_bias is on"
        return None

    def own_balancing(self, router: Any, parent: Any) -> OwnBalancing:
        rate, coefficient = router.bias_update_factor, router.aux_loss_coeff
        loss = f"aux_loss_coeff={coefficient}" if coefficient else None
        if not rate:
            return OwnBalancing(loss=loss)

        def stop() -> Any:
            # Some models call update_bias() whatever the factor is, and it raises if that is 0.
            router.bias_update_factor, router.update_bias = 0.0, _move_nothing

            def resume() -> None:
                router.bias_update_factor = rate
                del router.update_bias
                # Its own copy of the bias is older than ours, and would overwrite it.
                router.e_score_correction_bias_master = router._cumulative_expert_load = None

            return resume

        return OwnBalancing(f"gate_bias_update_factor={rate}", stop, loss)


def _move_nothing() -> None:
    """Takes the place of a Gate's own ``update_bias``. A function of a module, so that the model can be pickled."""


class _RefusedGate(RouterAdapter):
    """A gate that cannot be counted or steered."""

    framework = _Gate.framework

    def __init__(self, reason: str):
        self.reason = reason

    def refusal(self, router: Any) -> str | None:
        return self.reason


_OWN_FORWARD = "it routes by a forward of its own, which does not show its logits"

ROUTER_ADAPTERS: dict[str, RouterAdapter] = {
    "Gate": _Gate(),
    "FakeBalancedGate": _RefusedGate("it ignores its scores: fake_balanced_gate is on"),
    "DeepseekV4HashGate": _RefusedGate("it chooses by the id of the token (a hash router), which no bias moves"),
    "DeepseekV4VisionGate": _RefusedGate("it has a second bias, for visual tokens"),
    "KimiK3Gate": _RefusedGate(_OWN_FORWARD),
    "Gemma4Gate": _RefusedGate(_OWN_FORWARD),
    "InklingGate": _RefusedGate(_OWN_FORWARD),
}
