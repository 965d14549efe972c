"""Precision bf16-true rounds the expert bias. litgpt 0.5.13, lightning 2.6.6, torch 2.13, CPU.

e_score_correction_bias of GroupedTopkRouter is a buffer, and Fabric casts buffers with the weights. Biases of published
models lie near 7, where bfloat16 has steps of 0.03; Transformers keeps theirs in float32.
Expected: 6.9123. Actual: 6.90625.
"""

import lightning
from litgpt import Config
from litgpt.model import LLaMAMoE

groups = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2, "bias": False}
sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_expert": 8, "n_expert_per_token": 2, "norm_topk_prob": True}
block = LLaMAMoE(Config(**sizes, **groups, mlp_class_name="LLaMAMoE", moe_intermediate_size=8))
block.gate.e_score_correction_bias.fill_(6.9123)
fabric = lightning.Fabric(
    accelerator="cpu", devices=1, precision="bf16-true"
)  # as `litgpt finetune --precision bf16-true`
fabric.setup_module(block)
print(f"expected 6.9123, got {block.gate.e_score_correction_bias[0].item()}")
