"""With a capacity and padding to it, every expert counts the same, so the expert bias never moves.

Megatron-Core 0.19.2, TopKRouter.routing: _apply_expert_bias gets the routing map after apply_router_token_dropping.
Expected: the counts of the experts that tokens chose. Actual: the capacity, 16 for each. Without padding they are
cut off at the capacity. The losses count before dropping, and are right. Runs on a CPU.
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
capacity = {"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "alltoall"}

logits = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(79)) + torch.linspace(0.8, -0.8, 8)
expected = torch.zeros(8).index_add(0, logits.topk(2).indices.flatten(), torch.ones(128))
print("expected:                 ", expected.tolist())
for pads in (False, True):
    more = {"moe_router_score_function": "sigmoid", "moe_pad_expert_input_to_capacity": pads}
    config = TransformerConfig(**sizes, **options, **capacity, **more, use_cpu_initialization=True)
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    torch.nn.init.eye_(router.weight)
    router(logits.transpose(0, 1).contiguous())
    print(f"actual, padded is {pads!s:5}:   ", router.local_tokens_per_expert.tolist())
