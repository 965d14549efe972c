"""DeepSpeed's routers: the gate of its own MoE layer, and the router of AutoEP."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]

_FRAMEWORK = "deepspeed 0.19.8"


class _TopKGate(RouterAdapter):
    """The gate of ``deepspeed.moe.layer.MoE``, called as the layer does: with ``sparse_routes``.

    It returns (loss, capacity, number of experts, ids [k, tokens], places [k, tokens], weights [k, tokens], counts).
    Ids are -1 and weights 0 where a token found no place in its expert. The choice comes before that.
    """

    framework = _FRAMEWORK
    choice_is_hidden = True
    remedy = "Change that where deepspeed.moe.layer.MoE is built, or leave the gate out with attach(where=...)"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        (*_, weights, _), expert_ids = _sparse(output[0]), output[1]
        assert logits is not None
        return logits, weights.T, expert_ids

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return *output[:5], weights.T.contiguous(), output[6]

    def arguments(self, num_tokens: int) -> Mapping[str, Any]:
        return {"sparse_routes": True}

    def mask(self, arguments: Mapping[str, Any]) -> Tensor | None:
        used: Tensor | None = arguments.get("used_token")  # with k > 1 DeepSpeed routes the other tokens too
        return used

    def prepare(self, stand_in: Any) -> None:
        # A capacity for all tokens, so that the weights show the scores; no collectives, no timers.
        stand_in.capacity_factor = stand_in.eval_capacity_factor = float(stand_in.wg.weight.shape[0])
        stand_in.min_capacity, stand_in.ep_group, stand_in.wall_clock_breakdown = 0, None, False

    def refusal(self, router: Any) -> str | None:
        if "sparse_routes" not in inspect.signature(router.forward).parameters:
            return "its forward has no sparse_routes, with which DeepSpeed 0.19.8 returns the weights by token"
        if router.k == 2 and router.top2_2nd_expert_sampling:
            return "top2_2nd_expert_sampling=True draws the second expert by chance, which no bias steers"
        policy = router.noisy_gate_policy
        if policy == "Jitter" or (policy == "RSample" and router.k == 1):  # DeepSpeed ignores RSample for other k
            return f"noisy_gate_policy={policy!r} adds noise to the choice"
        return None

    def own_loss(self, output: Any) -> Tensor | None:
        loss: Tensor = output[0]
        return loss


class _TokenChoiceTopKRouter(RouterAdapter):
    """The router of AutoEP: (weights, expert_ids, counts)."""

    framework = _FRAMEWORK
    logits_returned_by = "gate"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        assert logits is not None
        return logits, output[0], output[1]

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return weights.view(output[0].shape), *output[1:]


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {
    "TopKGate": _TopKGate(),
    "TokenChoiceTopKRouter": _TokenChoiceTopKRouter(),
}


def _sparse(output: Any) -> Any:
    if len(output) != 7:
        raise EquipoiseError(
            f"a TopKGate must be called with sparse_routes=True, as deepspeed.moe.layer.MoE does: got {len(output)} "
            "outputs, which do not show the weights by token. Call the MoE layer."
        )
    return output
