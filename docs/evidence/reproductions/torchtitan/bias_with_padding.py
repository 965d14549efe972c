"""MoE counts padding for its expert bias. torchtitan 0.3.0, torch 2.13, CPU.

The chat data loader pads with eos and IGNORE_INDEX. MoE.forward has no mask, so padded tokens are counted.
Expected: the update of the tokens that are text. Actual: that of text and padding.
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


def update(x):
    moe = config.build()
    torch.nn.init.eye_(moe.router.gate.weight)
    block, model = torch.nn.Module(), torch.nn.Module()
    block.moe, block.moe_enabled = moe, True
    model.layers = torch.nn.ModuleDict({"0": block})
    optimizers = default_adamw(lr=0.0).build(model_parts=[model])
    register_moe_load_balancing_hook(optimizers, [model], dims.ParallelDims(1, 1, 1, 1, 1, 1, 1))
    moe(x).sum().backward()
    optimizers.step()
    return [round(value / 1e-3, 3) for value in moe.expert_bias_E.tolist()]


rows, row = (
    torch.randn(1, number, 8, 8, generator=torch.Generator().manual_seed(seed))[0] + torch.linspace(0.8, -0.8, 8)
    for number, seed in ((2, 54), (1, 55))
)
rows[1, 4:] = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])  # padding: the same token in each place
print(f"rows of 8, 4: expected {update(torch.cat([rows[0], rows[1, :4]])[None])}, got {update(rows)}")
print(f"a row of 5 tokens: expected {update(row[:, :5])}, got {update(row)}")
