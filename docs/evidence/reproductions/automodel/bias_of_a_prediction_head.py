"""The expert bias of DeepSeek-V4's multi-token-prediction head never moves. NeMo Automodel 0.7.0, torch 2.13, CPU.

DeepseekV4Model.update_moe_gate_bias walks through self.layers, and the head is ``mtp`` of the model around it.
Its gate has a bias, by the default gate_bias_update_factor of 1e-3, and counts in all steps.
Expected: the biases of both layers move by 0.001. Actual: that of the head stays 0. Runs 20 seconds.
"""

import torch

torch.cuda.current_device = lambda: 0  # not needed beside a GPU
from nemo_automodel.components.models.common.utils import BackendConfig  # noqa: E402
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4Config, DeepseekV4ForCausalLM  # noqa: E402

sizes = {"vocab_size": 8, "hidden_size": 8, "moe_intermediate_size": 8, "num_attention_heads": 2, "head_dim": 8}
sizes |= {"q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "qk_rope_head_dim": 4, "index_head_dim": 8}
sizes |= {"index_n_heads": 2, "index_topk": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 0}
config = DeepseekV4Config(
    **sizes, num_hidden_layers=1, num_nextn_predict_layers=1, num_hash_layers=0, compress_ratios=[0, 0],
    max_position_embeddings=64, dtype=torch.float32,
)  # fmt: skip
plain = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "experts": "torch", "dispatcher": "torch"}
torch.manual_seed(0)
model = DeepseekV4ForCausalLM(config, backend=BackendConfig(**plain, enable_hf_state_dict_adapter=False))
model.initialize_weights(torch.device("cpu"), torch.float32)
model.train()(torch.randint(8, (2, 8))).logits.sum().backward()
model.update_moe_gate_bias()  # as the recipe, after the optimizer's step
for name, module in model.named_modules():
    if name.endswith("gate"):
        bias = module.e_score_correction_bias
        print(
            f"{name}: expected 0.001, got {bias.abs().max():.3g}; not yet used counts {module._cumulative_expert_load}"
        )
