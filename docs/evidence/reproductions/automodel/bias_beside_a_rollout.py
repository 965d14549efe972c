"""A forward under no_grad moves the expert bias. NeMo Automodel 0.7.0, torch 2.13, CPU.

Gate.forward counts in training mode, with gradients or without: log-probabilities of an old policy are counted.
Expected: the update of the two micro-batches that are trained. Actual: that of the forward between them too.
Recomputation by apply_ac is not counted, and in eval() nothing is, which is right.
"""

import torch
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import MoE
from nemo_automodel.components.moe.parallelizer import apply_ac

SIZES = {"n_routed_experts": 8, "n_shared_experts": 0, "n_activated_experts": 2, "dim": 8, "inter_dim": 8}
SIZES |= {"moe_inter_dim": 8, "n_expert_groups": 1, "n_limited_groups": 1, "route_scale": 1.0, "dtype": torch.float32}
OPTIONS = {"score_func": "sigmoid", "norm_topk_prob": True, "aux_loss_coeff": 0.0, "gate_bias_update_factor": 1e-3}


def update(seed, is_recomputed, has_rollout):
    block, model = torch.nn.Sequential(), torch.nn.Module()
    backend = BackendConfig(linear="torch", experts="torch", dispatcher="torch")
    block.add_module("mlp", MoE(MoEConfig(**SIZES, **OPTIONS, train_gate=True), backend))
    torch.nn.init.eye_(block.mlp.gate.weight)
    model.layers = torch.nn.ModuleDict({"0": block})
    if is_recomputed:
        apply_ac(model, hidden_size=8, num_experts=8)
    for number, tokens in enumerate((8, 16, 8)):
        x = torch.randn(1, 1, tokens, 8, generator=torch.Generator().manual_seed(seed + number))[0]
        x = x + torch.linspace(0.8, -0.8, 8)
        if number == 1 and has_rollout:
            with torch.no_grad():
                model.layers["0"](x.flip(-1))
        elif number != 1:
            model.layers["0"](x).sum().backward()
    block.mlp.gate.update_bias()
    return [round(value / 1e-3) for value in block.mlp.gate.e_score_correction_bias.tolist()]


print(f"expected {update(62, False, False)}, got {update(62, False, True)}")
print(f"recomputed: expected {update(68, True, False)}, got {update(68, True, True)}")
