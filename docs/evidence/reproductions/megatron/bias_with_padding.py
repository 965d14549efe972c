"""A padding mask beside an expert bias raises RuntimeError, or is silently taken for a mask of experts.

Megatron-Core 0.19.2, TopKRouter._apply_expert_bias: routing_map & (~padding_mask), [tokens, experts] & [tokens].
Expected: padding is left out of local_tokens_per_expert. Actual: RuntimeError; with as many tokens as experts the mask
hides the experts of the same numbers. Issue #6111, mended on main by #6114. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
torch.compile = lambda function: function  # for a short error
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True, "add_bias_linear": False}
config = TransformerConfig(**sizes, **options, moe_router_score_function="sigmoid", use_cpu_initialization=True)

for rows, tokens, seed in ((2, 12, 54), (1, 5, 55)):  # of rows * 8 places, the rest is padding
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    torch.nn.init.eye_(router.weight)
    logits = torch.randn(rows, 8, 8, generator=torch.Generator().manual_seed(seed)) + torch.linspace(0.8, -0.8, 8)
    is_padding = (torch.arange(rows * 8) >= tokens).view(rows, 8)
    expected = torch.zeros(8).index_add(0, logits[~is_padding].topk(2).indices.flatten(), torch.ones(2 * tokens))
    print(f"{rows * 8} places, {tokens} tokens, 8 experts\n  expected: {expected.tolist()}")
    try:
        router(logits.transpose(0, 1).contiguous(), padding_mask=is_padding.t())
        print(f"  actual:   {router.local_tokens_per_expert.tolist()}")
    except RuntimeError as error:
        print(f"  actual:   RuntimeError: {str(error).splitlines()[0]}")
