"""The auxiliary loss takes sigmoid scores for shares. NeMo Automodel 0.7.0, torch 2.13, CPU.

Gate._route_scores divides scores by their sum only if norm_topk_prob and top-k > 1, which is about weights of experts.
Load is even here, so the loss is 1. Expected: 1, as with norm_topk_prob=True. Actual: the mean sum of the scores.
"""

import torch
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import Gate

SIZES = {"n_routed_experts": 8, "n_shared_experts": 0, "n_activated_experts": 2, "dim": 8, "inter_dim": 8}
SIZES |= {"moe_inter_dim": 8, "n_expert_groups": 1, "n_limited_groups": 1, "route_scale": 1.0, "dtype": torch.float32}


def loss(norm_topk_prob):
    options = {"score_func": "sigmoid", "norm_topk_prob": norm_topk_prob, "aux_loss_coeff": 1.0}
    gate = Gate(MoEConfig(**SIZES, **options, train_gate=True, gate_bias_update_factor=0.0)).train()
    torch.nn.init.eye_(gate.weight)
    tokens = torch.zeros(16, 8)
    for token in range(16):
        tokens[token, token % 8] += 2
        tokens[token, (token + 1) % 8] += 1
    return gate(tokens, torch.ones(16, dtype=torch.bool), None)[2].item()


print(f"norm_topk_prob=True: expected 1, got {loss(True):.4g}")
print(f"norm_topk_prob=False: expected 1, got {loss(False):.4g}")
