"""A forward in eval() is counted for the expert bias, if gradients are on.

Megatron-Core 0.19.2, TopKRouter._apply_expert_bias asks torch.is_grad_enabled(), and not self.training as the losses
do. Expected: an evaluation adds nothing to local_tokens_per_expert. Actual: it is counted. Under torch.no_grad, as in
Megatron's evaluate(), it is not. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True, "add_bias_linear": False}
config = TransformerConfig(**sizes, **options, moe_router_score_function="sigmoid", use_cpu_initialization=True)
router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups()).eval()

hidden = torch.randn(16, 1, 8, generator=torch.Generator().manual_seed(60))
with torch.no_grad():
    router(hidden)
print("16 tokens in eval() under no_grad: expected 0, actual", int(router.local_tokens_per_expert.sum()))
router(hidden)
print("16 tokens in eval() with gradients: expected 0, actual", int(router.local_tokens_per_expert.sum()))
