"""The loss counts experts that tokens did not get, with expert groups or with an expert bias.

Megatron-Core 0.19.2, compute_routing_scores_for_aux_loss takes a top-k of its own, without groups and without the bias.
Expected: the counts of the routing map that the router returns. Actual: others; a bias that evens the load changes
nothing in the loss. Issue #2767. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
from megatron.core import parallel_state, transformer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
loss = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1.0}
common = {"add_bias_linear": False, "use_cpu_initialization": True, "moe_router_score_function": "sigmoid"}
groups, bias = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}, {"moe_router_enable_expert_bias": True}

for kind, more, seed in (("groups", groups, 12), ("bias", bias, 13)):
    config = transformer.TransformerConfig(**sizes, **loss, **common, **more)
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    weight = torch.nn.init.eye_(router.weight).detach().clone().requires_grad_()
    if kind == "bias":
        router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    hidden = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed)) + torch.linspace(0.8, -0.8, 8)
    probs, routing_map = router(hidden.transpose(0, 1).contiguous())
    (0.0 * probs.sum()).backward()
    scores = (hidden @ weight.t()).sigmoid()
    p = (scores / scores.sum(-1, keepdim=True)).mean((0, 1))
    expected = 8 * (routing_map.sum(0) / routing_map.sum() * p).sum()
    expected.backward()
    actual = get_moe_metrics_tracker().metrics.pop("load_balancing_loss").values
    distance = (router.weight.grad - weight.grad).norm() / weight.grad.norm()
    print(f"{kind}: expected {expected:.4f}, actual {actual.item():.4f}; distance of the gradient: {distance:.4f}")
