"""The load metrics of a step are those of its last forward. NeMo Automodel 0.7.0, torch 2.13, CPU.

Gate.forward overwrites _last_expert_load, and collect_expert_loads reads it after the optimizer step.
Expected: the largest utilization (moe/expert_utilization_max) of all micro-batches that are trained.
Actual: that of the last micro-batch. An evaluation as the last forward would give its own.
"""

import torch
from nemo_automodel.components.moe import load_balance_metrics as metrics
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import Gate

SIZES = {"n_routed_experts": 8, "n_shared_experts": 0, "n_activated_experts": 2, "dim": 8, "inter_dim": 8}
SIZES |= {"moe_inter_dim": 8, "n_expert_groups": 1, "n_limited_groups": 1, "route_scale": 1.0, "dtype": torch.float32}
OPTIONS = {"score_func": "sigmoid", "norm_topk_prob": True, "aux_loss_coeff": 0.0, "gate_bias_update_factor": 1e-3}


def tokens(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, number, 8, generator=generator)[0, 0] + torch.linspace(0.8, -0.8, 8)


for words, trained, evaluated in (
    ("16 and 4 tokens", [tokens(16, 111), tokens(4, 112)], []),
    ("24 and 8 tokens", [tokens(24, 114), tokens(8, 115)], []),
    ("an evaluation between", [tokens(16, 116), tokens(16, 117)], [tokens(16, 118).flip(-1)]),
):
    gate = Gate(MoEConfig(**SIZES, **OPTIONS, train_gate=True))
    torch.nn.init.eye_(gate.weight)
    metrics.enable_load_balance_tracking(gate)
    for part, is_trained in ((trained[0], True), *((part, False) for part in evaluated), (trained[1], True)):
        gate.train(is_trained)(part, torch.ones(len(part), dtype=torch.bool), None)
    got = metrics.compute_brief_metrics(metrics.collect_expert_loads(gate))["moe/expert_utilization_max"]
    load = torch.bincount(torch.cat(trained).topk(2).indices.flatten(), minlength=8)
    print(f"{words}: expected {load.max() / load.float().mean():.4g}, got {got:.4g}")
