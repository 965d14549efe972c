"""OLMo-core's first MoE, in its transformer."""

import torch
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.nn.transformer.config import TransformerActivationCheckpointingMode as Mode
from olmo_core.optim import SkipStepAdamWConfig
from torch import distributed

from equipoise_lab.conformance.driver import Layer, NotOffered, Recompute, Refuses
from equipoise_lab.conformance.drivers.olmo_core_on_cpu import join_pipeline
from equipoise_lab.conformance.drivers.olmo_core_training import OlmoCoreTraining


class OlmoCore(OlmoCoreTraining):
    PACKAGE = "ai2-olmo-core"
    INTENDED_USE = {
        **OlmoCoreTraining.INTENDED_USE,
        "llama_like_moe": "olmo_core/nn/transformer/config.py, TransformerConfig",
        "dtype": "olmo_core/nn/transformer/config.py, TransformerConfig.dtype: a model is built in it, not cast",
        "checkpointing": "olmo_core/train/train_module/transformer/config.py: full by default; its error asks for less",
        "apply_ddp": "olmo_core/train/train_module/transformer/common.py, parallelize_model",
    }

    def __init__(self, layer: Layer) -> None:
        if layer.loss == "global_batch":
            raise NotOffered("a loss over the global batch")
        if layer.groups is not None:
            raise NotOffered("groups of experts")
        if layer.has_prediction_head:
            raise NotOffered("a multi-token-prediction head")
        self.layer = layer
        self._build(layer.dtype)

    def _build(self, dtype: torch.dtype, recompute: Recompute | None = None) -> None:
        layer, size = self.layer, self.layer.experts
        shape = {
            "d_model": size,
            "vocab_size": 8,
            "n_layers": layer.number,
            "n_heads": 1,
            "dtype": DType.from_pt(dtype),
        }
        config = TransformerConfig.llama_like_moe(
            **shape,
            num_experts=size,
            top_k=layer.k,
            expert_hidden_size=8,
            dropless=layer.capacity is None,
            capacity_factor=layer.capacity,
            lb_loss_weight=1.0 if layer.loss else None,
            z_loss_weight=None,
            attn_backend="torch",
        )
        moe = config.block.feed_forward_moe
        moe.dtype = DType.from_pt(dtype)
        moe.lb_loss_granularity = "instance" if layer.loss == "sequence" else "local_batch"
        moe.scale_loss_by_num_layers = False  # the sum over layers, not their mean
        moe.router.gating_function = layer.score_function
        moe.router.normalize_expert_weights = 1.0 if layer.normalises_weights else None
        moe.router.bias_gamma = layer.bias_rate or (1e-3 if layer.bias else None)  # it refuses 0; no step follows
        if layer.rank_without is not None and distributed.get_rank() == layer.rank_without:
            config.block = TransformerConfig.llama_like(**shape, attn_backend="torch").block
        self.model = config.build(init_device="cpu")
        self.routers = [block.feed_forward_moe.router for block in self.model.blocks.values() if block.is_moe]
        self._feed(dtype)
        if recompute is not None:
            finer = (Mode.selected_modules, None, ["blocks.*.feed_forward_moe.router"])
            try:
                self.model.apply_activation_checkpointing(*((Mode.full,) if recompute == "own" else finer))
            except OLMoConfigurationError as error:
                raise Refuses(str(error)) from error
        if layer.rank_without is not None:
            join_pipeline(self.model)
        elif distributed.is_initialized():
            self.model.apply_ddp()
        self.optimizer = SkipStepAdamWConfig(lr=0.0, rolling_interval_length=4).build(self.model)
