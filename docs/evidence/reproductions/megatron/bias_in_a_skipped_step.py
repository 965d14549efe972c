"""The expert bias moves in a step that the optimizer skips.

Megatron-Core 0.19.2: finalize_model_grads moves the bias before optimizer.step() sees the gradients. Steps are skipped
above OptimizerConfig.grad_norm_skip_threshold, and in fp16 where a gradient is infinite: as in a run's first steps,
whose loss scale is 2**32. Expected: the bias stays, as the weights do. Actual: it moves. Runs on a CPU.
"""

from unittest.mock import MagicMock

import torch
import torch.distributed as dist

tensor, zeros, of_type = torch.tensor, torch.zeros, torch.Tensor.type  # these lines: in place of a GPU
torch.cuda.current_device, torch.cuda.current_stream = lambda: "cpu", MagicMock()
torch.tensor = lambda *arguments, device=None, **options: tensor(*arguments, **options)
torch.zeros = lambda *arguments, device=None, **options: zeros(*arguments, **options)
torch.Tensor.type = lambda self, *to: of_type(self, *to) if to else of_type(self).replace("torch.", "torch.cuda.")
from megatron.core import distributed, optimizer, parallel_state, transformer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True, "add_bias_linear": False}
options |= {"moe_router_score_function": "sigmoid", "use_cpu_initialization": True}
for name, fp16, skip in (("large norm", False, {"grad_norm_skip_threshold": 1e-9}), ("infinite, fp16", True, {})):
    types = {"fp16": fp16, "params_dtype": torch.half if fp16 else torch.float32}
    config = transformer.TransformerConfig(**sizes, **options, **types)
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    torch.nn.init.eye_(router.weight)
    model = transformer.module.Float16Module(config, router) if fp16 else router
    model = distributed.DistributedDataParallel(config, distributed.DistributedDataParallelConfig(), model)
    adam = optimizer.get_megatron_optimizer(optimizer.OptimizerConfig(lr=0.0, **types, **skip), [model])
    probs, _ = model(torch.randn(16, 1, 8, generator=torch.Generator().manual_seed(90)))
    adam.scale_loss(probs.square().sum()).backward()
    distributed.finalize_model_grads([model])
    is_applied, *_ = adam.step()
    moves = (1000 * router.expert_bias).round().tolist()  # the rate is 1e-3
    print(f"{name}, step applied: {is_applied}; moves expected: 0, actual: {moves}")
