"""The expert bias of a multi-token-prediction layer never moves. torchtitan 0.3.0, torch 2.13, CPU.

register_moe_load_balancing_hook walks model.layers. The layers of the prediction heads stand in model.mtp_layers.
Expected: each bias moves. Actual: that of the prediction head stays 0, and its counts are not cleared.
The main branch has it right since pull request 4494.
"""

import torch
import torch.distributed as dist
import torchtitan.distributed.parallel_dims as dims
from torchtitan.components.optimizer import default_adamw
from torchtitan.models import deepseek_v3
from torchtitan.models.common.attention import ScaledDotProductAttention

dims.device_type = "cpu"  # not needed beside a GPU
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
spec = deepseek_v3.model_registry("debugmodel", num_mtp_layers=1)
spec.model.layers = spec.model.layers[1:2]  # one MoE layer
for block in spec.model.layers + spec.model.mtp_layers:
    block.attention.inner_attention = ScaledDotProductAttention.Config()  # FlexAttention has no backward on a CPU
model = spec.model.build()
with torch.no_grad():
    model.init_weights()
optimizers = default_adamw(lr=0.0).build(model_parts=[model])
spec.post_optimizer_build_fn(optimizers, [model], dims.ParallelDims(1, 1, 1, 1, 1, 1, 1))
tokens = torch.randint(2048, (2, 16), generator=torch.Generator().manual_seed(0))
sum(output.sum() for output in model(tokens)).backward()
optimizers.step()
for name, moe in (("layer", model.layers["0"].moe), ("prediction head", model.mtp_layers[0].moe)):
    print(f"{name}: moved by {moe.expert_bias_E.abs().max():.3g}, expected more than 0; counts left: "
          f"{moe.tokens_per_expert_E.sum():.0f}")  # fmt: skip
