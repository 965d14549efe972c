"""The auxiliary loss of small sigmoid scores is too small. NeMo Automodel 0.7.0, torch 2.13, CPU.

Gate._route_scores divides the scores by their sum plus 1e-20. Sigmoids of logits near -50 are 2e-22, a float32.
Load is even here, so the loss is 1. Expected: 1 at any level of the logits. Actual: 0.237 at -50.
"""

import torch
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import Gate

SIZES = {"n_routed_experts": 8, "n_shared_experts": 0, "n_activated_experts": 2, "dim": 8, "inter_dim": 8}
SIZES |= {"moe_inter_dim": 8, "n_expert_groups": 1, "n_limited_groups": 1, "route_scale": 1.0, "dtype": torch.float32}
OPTIONS = {"score_func": "sigmoid", "norm_topk_prob": True, "aux_loss_coeff": 1.0, "gate_bias_update_factor": 0.0}

gate = Gate(MoEConfig(**SIZES, **OPTIONS, train_gate=True)).train()
torch.nn.init.eye_(gate.weight)
for level in (0.0, -50.0):
    tokens = torch.full((16, 8), level)
    for token in range(16):
        tokens[token, token % 8] += 2
        tokens[token, (token + 1) % 8] += 1
    loss = gate(tokens, torch.ones(16, dtype=torch.bool), None)[2].item()
    print(f"logits near {level:.0f}: expected 1, got {loss:.4g}")
