"""The load-balancing loss of a micro-batch that is all padding is nan.

Megatron-Core 0.19.2, switch_load_balancing_loss_func divides by the square of the number of tokens that are no padding.
Expected: 0, and no gradient. Actual: nan, and a gradient of nan. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1.0, "add_bias_linear": False}
config = TransformerConfig(**sizes, **options, use_cpu_initialization=True)
router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
router.set_layer_number(1)

hidden = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(8))  # [length, rows, hidden size]
probs, _ = router(hidden, padding_mask=torch.ones(8, 2, dtype=torch.bool))  # True is padding
(0.0 * probs.sum()).backward()
loss = get_moe_metrics_tracker().metrics["load_balancing_loss"].values
print("expected: 0, with a gradient of 0")
print(f"actual:   {loss.item()}, with a gradient of {router.weight.grad.abs().max().item()}")
