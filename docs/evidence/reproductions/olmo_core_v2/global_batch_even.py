"""global_load_balancing pools counts over ranks, not over micro-batches. ai2-olmo-core 3.0.0, torch 2.13, CPU.

Expected, for a loss over the global batch: f counts the micro-batches so far (Demons in the Detail, section 3.2).
Actual: f of one micro-batch. In one micro-batch a rank, the loss is right, on one rank and on two.
"""

import torch
import torch.distributed as dist
from olmo_core.nn.moe.v2.router import MoERouterConfigV2

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def window(number, of, seed):
    """Micro-batches of one row, and the gradient that they give the gate, which is the identity."""
    router = MoERouterConfigV2(
        d_model=8, num_experts=8, top_k=2, lb_loss_weight=1.0, global_load_balancing=True
    ).build()
    router.weight.data.copy_(torch.eye(8).flatten())
    router.set_load_balancing_process_group(dist.group.WORLD)
    gate, pooled, total = torch.eye(8, requires_grad=True), torch.zeros(8), 0.0
    for n in range(number):
        x = torch.randn(1, 1, of, 8, generator=torch.Generator().manual_seed(seed + n))[0] + torch.linspace(
            0.8, -0.8, 8
        )
        router.compute_aux_loss(*router(x, False, loss_div_factor=torch.tensor(number * of))[-1]).backward()
        scores = (x @ gate.T).softmax(-1).flatten(0, 1)
        pooled += torch.bincount(scores.topk(2).indices.flatten(), minlength=8)
        total += 8 * (pooled / pooled.sum() * scores.mean(0)).sum() / number
    (right,) = torch.autograd.grad(total, gate)
    return router.weight.grad.view(8, 8), right


for number, of, seed in ((3, 4, 26), (2, 4, 35), (2, 8, 46)):
    ours, right = window(number, of, seed)
    print(f"{number} micro-batches of {of}: expected distance 0, got {(ours - right).norm() / right.norm():.3f}")
