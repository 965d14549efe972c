"""MoE counts forwards under no_grad for its expert bias. torchtitan 0.3.0, torch 2.13, CPU.

MoE.forward counts in training mode, with gradients or without: a rollout or log-probabilities in train() are counted.
Expected: the update of the two micro-batches that are trained. Actual: that of the forward between them too.
"""

import torch
import torchtitan.distributed.parallel_dims as dims
from torchtitan.components.optimizer import default_adamw, register_moe_load_balancing_hook
from torchtitan.models.common import config_utils as make

dims.device_type = "cpu"  # not needed beside a GPU
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
router = make.make_router_config(dim=8, num_experts=8, gate_param_init={}, top_k=2)
sizes = {"dim": 8, "hidden_dim": 8, "num_experts": 8, "top_k": 2, "param_init": {}, "comm_backend": "standard"}
config = make.make_moe_config(num_experts=8, router=router, routed_experts=make.make_routed_experts_config(**sizes))


def update(has_rollout):
    moe = config.build()
    torch.nn.init.eye_(moe.router.gate.weight)
    block, model = torch.nn.Module(), torch.nn.Module()
    block.moe, block.moe_enabled = moe, True
    model.layers = torch.nn.ModuleDict({"0": block})
    optimizers = default_adamw(lr=0.0).build(model_parts=[model])
    register_moe_load_balancing_hook(optimizers, [model], dims.ParallelDims(1, 1, 1, 1, 1, 1, 1))
    first, between, last = (
        torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(s))[0] + torch.linspace(0.8, -0.8, 8)
        for n, s in ((8, 62), (16, 63), (8, 64))
    )
    moe(first).sum().backward()
    if has_rollout:
        with torch.no_grad():
            moe(between.flip(-1))
    moe(last).sum().backward()
    optimizers.step()
    return [round(value / 1e-3, 3) for value in moe.expert_bias_E.tolist()]


print(f"expected {update(False)}, got {update(True)}")
