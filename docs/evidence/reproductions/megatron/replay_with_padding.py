"""Replayed routing beside an expert bias: a padding mask raises RuntimeError, and without one padding is counted.

Megatron-Core 0.19.2: what was recorded for padding, here expert 0, is replayed as text, and _apply_expert_bias cannot
combine a map of [tokens, experts] with a mask of [tokens]. Expected: the counts of 8 tokens. Actual: RuntimeError;
without the mask 8 more of expert 0. Issue #6111, mended on main by #6114. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
torch.compile = lambda function: function  # for a short error
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True, "add_bias_linear": False}
more = {"moe_router_score_function": "sigmoid", "moe_enable_routing_replay": True, "use_cpu_initialization": True}
router = TopKRouter(TransformerConfig(**sizes, **options, **more), ProcessGroupCollection.use_mpu_process_groups())

is_padding = torch.arange(8)[:, None].expand(8, 2) >= 4  # two rows of 8, half of each is padding
ids = torch.rand(8, 2, 8, generator=torch.Generator().manual_seed(104)).argsort(-1)[..., :2]
ids[is_padding] = 0
expected = torch.zeros(8).index_add(0, ids[~is_padding].flatten(), torch.ones(16))
print("expected:          ", expected.tolist())
RouterReplay.set_replay_data([ids.flatten(0, 1)])
RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
try:
    router(torch.zeros(8, 2, 8), padding_mask=is_padding)
except RuntimeError as error:
    print("actual:             RuntimeError:", str(error).splitlines()[0])
router(torch.zeros(8, 2, 8))
print("actual, no mask:   ", router.local_tokens_per_expert.tolist())
