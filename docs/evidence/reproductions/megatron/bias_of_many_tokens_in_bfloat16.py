"""In a bfloat16 model tokens are counted in bfloat16, and the expert bias moves by rounded counts.

Megatron-Core 0.19.2: Float16Module casts the buffer local_tokens_per_expert. _maintain_float32_expert_bias keeps the
bias in float32, and not the counts. Expected: exact counts. Actual: off by up to 72 of 4,000 after 16,000 tokens; the
first expert has more than the mean of 4,000 and is taken for less. Mended on main by #7081. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True, "add_bias_linear": False}
types = {"bf16": True, "params_dtype": torch.bfloat16, "moe_router_dtype": "fp32"}
more = {"moe_router_score_function": "sigmoid", "use_cpu_initialization": True}
config = TransformerConfig(**sizes, **options, **types, **more)
router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
Float16Module(config, router)
torch.nn.init.eye_(router.weight)

order = torch.rand(64, 250, 1, 8, generator=torch.Generator().manual_seed(83)).argsort(-1)
expected = torch.zeros(8)
for ranks in order:  # 64 micro-batches of 250 tokens
    router((0.5 * ranks - 2).bfloat16())
    expected += (ranks >= 6).sum((0, 1))
print("expected:", expected.tolist())
print("actual:  ", router.local_tokens_per_expert.tolist(), router.local_tokens_per_expert.dtype)
