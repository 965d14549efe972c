"""OLMo-core's second MoE, in its ``OLMoDDPModel``."""

from collections.abc import Sequence
from typing import Any

import torch
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.moe.v2.qwen import QWEN3_DENSE_MOE_LAYER_TYPE, build_qwen3_moe_config
from torch import Tensor, distributed

from equipoise_lab.conformance.driver import Batch, Layer, NotOffered, NotTried, Recompute, Refuses, StepResult
from equipoise_lab.conformance.drivers import olmo_core_v2_on_cpu as on_cpu
from equipoise_lab.conformance.drivers.olmo_core_training import OlmoCoreTraining

DENSE = (QWEN3_DENSE_MOE_LAYER_TYPE,)  # layers with full attention


class OlmoCoreV2(OlmoCoreTraining):
    PACKAGE = "ai2-olmo-core"
    INTENDED_USE = {
        **OlmoCoreTraining.INTENDED_USE,
        "build_qwen3_moe_config": "olmo_core/nn/moe/v2/qwen.py",
        "loss_div_factor; finalize_grad_reduce": "olmo_core/train/train_module/transformer/ddp_train_module.py",
        "global_load_balancing": "olmo_core/nn/moe/v2/router.py, MoERouterConfigV2: over ranks, the loss and a metric",
        "recompute_each_block": "olmo_core/nn/transformer/config.py, OLMoDDPModelConfig",
        "apply_dp": "olmo_core/nn/ddp/model.py, OLMoDDPModel: it casts the model to its training dtype, bfloat16",
    }

    def __init__(self, layer: Layer) -> None:
        if layer.has_prediction_head:
            raise NotOffered("a multi-token-prediction head")
        if layer.capacity is not None:
            raise NotTried("needs a GPU: a capacity belongs to its expert parallelism")
        self.layer = layer
        self._build(layer.dtype)

    def _build(self, dtype: torch.dtype, recompute: Recompute | None = None) -> None:
        layer, size = self.layer, self.layer.experts
        config = build_qwen3_moe_config(
            vocab_size=8,
            d_model=size,
            n_layers=layer.number,
            num_attention_heads=1,
            num_key_value_heads=1,
            attention_head_dim=8,
            attention_rotary_dim=8,
            num_experts=size,
            num_experts_per_tok=layer.k,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=None,
            layer_types=DENSE,
            attention_output_gate=False,
            norm_type=LayerNormType.rms,
            attention_backend=AttentionBackendName.torch,
            router_aux_loss_weight=1.0 if layer.loss else None,
        )
        config.recompute_each_block = recompute is not None
        router = config.block.routed_experts_router
        router.gating_function = layer.score_function
        router.normalize_expert_weights = 1.0 if layer.normalises_weights else None
        router.lb_loss_granularity = "instance" if layer.loss == "sequence" else "local_batch"
        router.global_load_balancing = layer.loss in ("global_batch", None)
        router.n_group, router.topk_group = layer.groups or (None, None)
        router.bias_gamma = layer.bias_rate or (1e-3 if layer.bias else None)  # it refuses 0; no step follows
        if layer.rank_without is not None and distributed.get_rank() == layer.rank_without:
            on_cpu.leave_out_experts(config.block)
        self.model, self.optimizer = on_cpu.built(config, dtype, is_staged=layer.rank_without is not None)
        blocks = self.model.blocks.values()
        self.routers = [b.routed_experts_router for b in blocks if b.routed_experts_router is not None]
        self._feed(dtype)

    def _loss_div_factor(self, labels: Tensor) -> Tensor:
        ranks = distributed.get_world_size() if self.layer.rank_without is None else 1
        if ranks > 1:
            distributed.all_reduce(labels)
        return labels.clamp_min(1) / ranks

    def train_step(self, batches: Sequence[Batch], **how: Any) -> StepResult:
        try:
            return super().train_step(batches, **how)
        except RuntimeError as error:
            if "Non-finite" in str(error):  # the optimizer's check, which ends the run
                raise Refuses(str(error)) from error
            raise

    def default_bias_rate(self) -> float:
        return build_qwen3_moe_config(n_layers=1, layer_types=DENSE).block.routed_experts_router.bias_gamma or 0.0
