"""Megatron-Core's routers."""

import re
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import OwnBalancing, RouterAdapter

__all__ = ["ROUTER_ADAPTERS"]

# Options of its config under which the choice is another than the best by score and bias, or cannot be seen.
_REFUSED = {
    "moe_expert_capacity_factor": "drops tokens after the choice, which its output then does not show",
    "moe_expert_rank_capacity_factor": "drops tokens after the choice, which its output then does not show",
    "moe_router_force_load_balancing": "replaces the logits by random numbers",
    "moe_router_force_biased": "adds random numbers to the logits",
    "moe_input_jitter_eps": "adds noise to the tokens",
    "moe_enable_routing_replay": "replays a recorded choice",
    "moe_router_fusion": "chooses in a kernel of Transformer Engine, which cannot be tried on a CPU",
    "overlap_moe_expert_parallel_comm": "runs parts of two micro-batches in turn, outside of the model's forward",
    "hybrid_context_parallel": "gives micro-batches context parallel groups of their own",
}
_CHOOSE_OTHERWISE = ("sinkhorn", "quantile_balancing")  # of moe_router_load_balancing_type
_OWN_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
_IN_GRAPHS = {"full", "moe", "moe_router", "moe_preprocess"}  # CUDA graphs of these parts hold a router


class _TopKRouter(RouterAdapter):
    """(weights [tokens, experts], which experts are chosen [tokens, experts]); tokens stand [sequence, batch]."""

    framework = "megatron-core 0.19.2"
    is_sequence_first = True
    attention_mask_hides = True
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
        if is_padding is None:
            return None
        is_padding = is_padding.bool()
        if getattr(arguments["self"], "is_mtp_layer", False):
            is_padding = _with_end(is_padding, arguments["self"])
        return ~is_padding.T

    def layer_name(self, router: Any, name: str) -> str:
        """A pipeline stage, and each chunk of one, counts its layers from 0."""
        number = getattr(router, "layer_number", None)  # in the whole model, from 1
        name = re.sub(r"^\d+\.(?=.)", "", name)
        if number is None or getattr(router, "is_mtp_layer", False):
            return name
        return re.sub(r"\bdecoder\.layers\.\d+", f"decoder.layers.{number - 1}", name)

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
        if kind in _CHOOSE_OTHERWISE:
            return f"moe_router_load_balancing_type={kind!r} of its config chooses by more than scores and a bias"
        if (getattr(config, "gtp_weight_remat_size", 1) or 1) > 1:
            return "gtp_weight_remat_size of its config splits tokens over ranks that no group of Megatron's losses has"
        if _graph_holds_router(config):
            return "cuda_graph_impl of its config captures the router in a graph, whose replays run no Python"
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

        coefficients = {name: router.get_aux_loss_coeff(name) for name in _OWN_LOSSES}  # its names may be several
        losses = [f"{name} with moe_aux_loss_coeff={value}" for name, value in coefficients.items() if value]
        z_loss = f"moe_z_loss_coeff={config.moe_z_loss_coeff}" if config.moe_z_loss_coeff else None
        return OwnBalancing(update, stop, " and ".join(losses) or None, z_loss)


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {"TopKRouter": _TopKRouter()}


def _with_end(is_padding: Tensor, router: Any) -> Tensor:
    """The mask of an MTP layer, whose last tokens are as the one before them.

    Megatron shifts the mask by one token for each layer of multi-token prediction, and fills the end with zeros: the
    last tokens of a padded row would count.
    """
    config, depth = router.config, router.layer_number
    if config.mtp_use_repeated_layer and config.mtp_num_layers > 1:
        raise EquipoiseError(
            "an MTP layer must know how many tokens ahead it predicts: mtp_use_repeated_layer calls one layer for "
            f"{config.mtp_num_layers} distances, with a padding mask that is shifted by each. Leave padding_mask out, "
            "or mtp_use_repeated_layer."
        )
    if depth >= len(is_padding):
        return is_padding
    return torch.cat([is_padding[:-depth], is_padding[-depth - 1].expand(depth, -1)])


def _graph_holds_router(config: Any) -> bool:
    implementation = getattr(config, "cuda_graph_impl", None)
    if implementation in (None, "none"):
        return False
    modules = getattr(config, "cuda_graph_modules", None) or ["full"]
    names = modules.split(",") if isinstance(modules, str) else [getattr(module, "name", module) for module in modules]
    return implementation == "full_iteration" or not _IN_GRAPHS.isdisjoint(names)
