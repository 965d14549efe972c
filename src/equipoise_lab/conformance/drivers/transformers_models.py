"""Small models of Transformers: Qwen3 MoE for a softmax and its loss, DeepSeek-V3 for a sigmoid and its bias."""

from typing import Any

import torch
import transformers

from equipoise_lab.conformance.driver import Layer

__all__ = ["VOCABULARY", "model_of"]

VOCABULARY = 32
SMALL = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "head_dim")


def model_of(layer: Layer) -> Any:
    """The model. Its gates are the identity, and its experts give 0, so cross-entropy has no gradient at a gate."""
    groups, open_groups = layer.groups or (1, 1)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe" if layer.score_function == "softmax" else "deepseek_v3",
        **dict.fromkeys(SMALL, 4),
        vocab_size=VOCABULARY,
        hidden_size=layer.experts,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=layer.number,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        num_experts_per_tok=layer.k,
        norm_topk_prob=layer.normalises_weights,
        num_local_experts=layer.experts,
        first_k_dense_replace=0,
        n_group=groups,
        topk_group=open_groups,
        router_aux_loss_coef=1.0,
        output_router_logits=layer.score_function == "softmax" and not layer.sets_coefficient_only,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.copy_(torch.eye(layer.experts))
            block.mlp.experts.down_proj.zero_()
            if layer.bias is not None:
                block.mlp.gate.e_score_correction_bias.copy_(torch.tensor(layer.bias))
    return model
