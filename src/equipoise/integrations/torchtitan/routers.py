"""torchtitan's routers."""

from typing import Any

from torch import Tensor, nn

from equipoise.routers.adapter import OwnBalancing, RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]


class _TokenChoiceTopKRouter(RouterAdapter):
    """(weights, expert_ids, scores), all [batch, sequence, ...]; DTensors under tensor and sequence parallelism."""

    framework = "torchtitan 0.3.0"
    logits_returned_by = "gate"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        weights, expert_ids, _ = output
        return _local(logits), _local(weights), _local(expert_ids)

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        before = output[0]
        weights = weights.view(_local(before).shape)
        if type(before).__name__ == "DTensor":
            placed = {"shape": before.shape, "stride": before.stride(), "run_check": False}
            weights = before.from_local(weights, before.device_mesh, before.placements, **placed)
        return weights, *output[1:]

    def refusal(self, router: nn.Module) -> str | None:
        if getattr(router, "_debug_force_load_balance", False):
            return "it ignores its scores: moe_force_load_balance of the debug options is on"
        return None

    def own_balancing(self, router: Any, parent: Any) -> OwnBalancing:
        rate = getattr(parent, "load_balance_coeff", None)
        if not rate:
            return OwnBalancing()

        def stop() -> Any:
            parent.load_balance_coeff = 0.0  # None would make the block pass no bias
            return lambda: setattr(parent, "load_balance_coeff", rate)

        return OwnBalancing(f"load_balance_coeff={rate}", stop)


def _local(value: Any) -> Tensor:
    """This rank's part of a DTensor."""
    local: Tensor = value.to_local() if type(value).__name__ == "DTensor" else value
    return local


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {"TokenChoiceTopKRouter": _TokenChoiceTopKRouter()}
