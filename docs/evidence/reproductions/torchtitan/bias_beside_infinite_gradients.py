"""The expert bias moves beside infinite gradients. torchtitan 0.3.0, torch 2.13, CPU.

Trainer.train_step clips gradients, without error_if_nonfinite, and steps; the bias moves in a hook before the step.
Weights become nan in this step too, and the Trainer stops at the next loss that it logs.
Expected: the bias stays. Actual: it moves.
"""

import torch
import torchtitan.distributed.parallel_dims as dims
from torchtitan.components.optimizer import default_adamw, register_moe_load_balancing_hook
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models.common import config_utils as make

dims.device_type = "cpu"  # not needed beside a GPU
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
router = make.make_router_config(dim=8, num_experts=8, gate_param_init={}, top_k=2)
sizes = {"dim": 8, "hidden_dim": 8, "num_experts": 8, "top_k": 2, "param_init": {}, "comm_backend": "standard"}
config = make.make_moe_config(num_experts=8, router=router, routed_experts=make.make_routed_experts_config(**sizes))


def update(is_finite):
    moe = config.build()
    torch.nn.init.eye_(moe.router.gate.weight)
    block, model = torch.nn.Module(), torch.nn.Module()
    block.moe, block.moe_enabled = moe, True
    model.layers = torch.nn.ModuleDict({"0": block})
    optimizers = default_adamw(lr=0.0).build(model_parts=[model])
    register_moe_load_balancing_hook(optimizers, [model], dims.ParallelDims(1, 1, 1, 1, 1, 1, 1))
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(93))[0] + torch.linspace(0.8, -0.8, 8)
    moe(x).sum().backward()
    if not is_finite:
        moe.router.gate.weight.grad.fill_(torch.inf)
    clip_grad_norm_(model.parameters(), 1.0)
    optimizers.step()
    return [round(value / 1e-3, 3) for value in moe.expert_bias_E.tolist()]


print(f"beside infinite gradients: expected {[0.0] * 8}, got {update(False)}")
print(f"beside finite ones: {update(True)}")
