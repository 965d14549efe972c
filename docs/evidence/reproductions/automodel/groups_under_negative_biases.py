"""Closed expert groups win against negative scores. NeMo Automodel 0.7.0, torch 2.13, CPU.

With score_func "sigmoid" (DeepSeek-V3, GLM) Gate._route_scores multiplies the biased scores of closed groups by 0. If
the scores of open groups are negative, 0 is larger. "sigmoid_with_bias" fills with -inf, and is right.
A bias that is the same for all experts changes no choice. Expected: the same experts.
Actual: none of 16 tokens has them.
"""

import torch
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import Gate

SIZES = {"n_routed_experts": 8, "n_shared_experts": 0, "n_activated_experts": 2, "dim": 8, "inter_dim": 8}
SIZES |= {"moe_inter_dim": 8, "n_expert_groups": 4, "n_limited_groups": 2, "route_scale": 1.0, "dtype": torch.float32}
OPTIONS = {"norm_topk_prob": True, "aux_loss_coeff": 0.0, "gate_bias_update_factor": 1e-3, "train_gate": True}

generator = torch.Generator().manual_seed(101)
tokens = torch.randn(1, 2, 8, 8, generator=generator).reshape(16, 8) + torch.linspace(0.8, -0.8, 8)
for function in ("sigmoid", "sigmoid_with_bias"):
    gate = Gate(MoEConfig(**SIZES, **OPTIONS, score_func=function)).eval()
    torch.nn.init.eye_(gate.weight)
    without = gate(tokens, torch.ones(16, dtype=torch.bool), None)[1].sort().values
    gate.e_score_correction_bias -= 2
    shifted = gate(tokens, torch.ones(16, dtype=torch.bool), None)[1].sort().values
    print(f"{function}: expected 16 of 16 tokens, got {int((without == shifted).all(-1).sum())}")
