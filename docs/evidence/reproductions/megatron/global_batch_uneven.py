"""global_aux_loss has the wrong scale in micro-batches of unequal numbers of tokens.

Megatron-Core 0.19.2, TopKRouter._apply_global_aux_loss: counts are averaged over micro-batches, and then divided by the
tokens of the last micro-batch. Expected: f = sum of counts / (k * sum of tokens). Actual: exact for 4, 4 and 4
tokens; for 6, 2 and 4 the gradient is 1.28 times as strong, and 0.55 of its size away. Issue #7213. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1.0, "add_bias_linear": False}
config = TransformerConfig(**sizes, **options, use_cpu_initialization=True)
MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / 3))  # as the schedules do, for three micro-batches

for lengths, seed in (((4, 4, 4), 26), ((6, 2, 4), 29)):
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    weight = torch.nn.init.eye_(router.weight).detach().clone().requires_grad_()
    counts = torch.zeros(8)
    for step, tokens in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed + step)
        hidden = torch.randn(max(lengths), 1, 8, generator=generator) + torch.linspace(0.8, -0.8, 8)
        probs, _ = router(hidden, padding_mask=torch.arange(max(lengths))[:, None] >= tokens)  # True is padding
        (0.0 * probs.sum()).backward()
        scores = (hidden[:tokens, 0] @ weight.t()).softmax(-1)
        counts += torch.zeros(8).index_add(0, scores.topk(2).indices.flatten(), torch.ones(2 * tokens))
        (8 * (counts / counts.sum() * scores.mean(0)).sum() / 3).backward()
    right, actual = weight.grad, router.weight.grad
    strength, distance = (actual * right).sum() / right.square().sum(), (actual - right).norm() / right.norm()
    print(f"{lengths}: expected strength 1, distance 0; actual {strength:.4f}, {distance:.4f}")
