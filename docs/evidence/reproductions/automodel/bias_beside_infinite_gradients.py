"""The expert bias moves beside infinite gradients. NeMo Automodel 0.7.0, torch 2.13, CPU.

The recipe (_run_train_optim_step in recipes/llm/train_ft.py) clips gradients with error_if_nonfinite=False, steps, and
moves the bias. Weights become nan in this step too.
Expected: the step is not applied, and the bias stays. Actual: it moves.
"""

import torch
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3Config, DeepseekV3ForCausalLM
from nemo_automodel.components.training.utils import scale_grads_and_clip_grad_norm

sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts"), 8)
sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "n_group", "topk_group"), 1)
sizes |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4)
sizes |= {"vocab_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 0, "dtype": torch.float32}
plain = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "experts": "torch", "dispatcher": "torch"}
torch.manual_seed(0)
backend = BackendConfig(**plain, enable_hf_state_dict_adapter=False)
model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes), backend=backend)
model.initialize_weights(torch.device("cpu"), torch.float32)
optimizer = torch.optim.AdamW(model.parameters())

model.train()(torch.randint(32, (1, 16))).logits.sum().backward()
model.lm_head.weight.grad.fill_(torch.inf)
norm = scale_grads_and_clip_grad_norm(1.0, [model], pp_enabled=False, num_label_tokens=15, dp_group_size=1)
optimizer.step()
model.update_moe_gate_bias()
bias = model.model.layers["0"].mlp.gate.e_score_correction_bias
print(f"norm {float(norm)}, weights are finite: {bool(model.lm_head.weight.isfinite().all())}")
print(f"expected {[0.0] * 8}, got {[round(value, 6) for value in bias.tolist()]}")
