"""OLMoDDPModel casts the score bias to bfloat16. ai2-olmo-core 3.0.0, torch 2.13, CPU.

init_weights() and apply_dp() of OLMoDDPModel call self.to(torch.bfloat16), which casts buffers. A score bias has then
steps of 0.03 at 6.9 and 0.004 at 0.5, so that updates of 0.001 are lost or rounded up.
Expected: 6.9123 and 0.4, 0.6 after 100 updates of 0.001. Actual: 6.90625 and 0.3047, 0.5.
"""

import torch
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.moe.v2.qwen import QWEN3_DENSE_MOE_LAYER_TYPE, build_qwen3_moe_config

config = build_qwen3_moe_config(
    vocab_size=8, d_model=8, n_layers=1, num_attention_heads=1, num_key_value_heads=1, attention_head_dim=8,
    attention_rotary_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8,
    shared_expert_intermediate_size=None, layer_types=(QWEN3_DENSE_MOE_LAYER_TYPE,), attention_output_gate=False,
    norm_type=LayerNormType.rms, attention_backend=AttentionBackendName.torch,
)  # fmt: skip
config.block.routed_experts_router.bias_gamma = 1e-3
config.block.routed_experts_router.gating_function = "sigmoid"
model = config.build(init_device="cpu")
model.init_weights(device=torch.device("cpu"))
router = model.blocks["0"].routed_experts_router
router.weight.data.copy_(torch.eye(8).flatten())
router.score_bias.fill_(6.9123)
print(f"{router.score_bias.dtype}: expected 6.9123, got {router.score_bias[0].item()}")
router.score_bias.fill_(0.5)
x = 0.01 * torch.arange(8.0).flip(0).expand(1, 8, 8) + torch.tensor([3.0] * 2 + [-3.0] * 6)
for _ in range(100):
    router.compute_aux_loss(*router(x, False)[-1])
    model.post_batch()
print(f"expected 0.4 and 0.6, got {router.score_bias[0].item():.4g} and {router.score_bias[-1].item():.4g}")
