"""The balancing loss is twice as strong where half of the labels are masked. ai2-olmo-core 3.0.0, torch 2.13, CPU.

OLMoDDPTrainModule.train_batch divides it by the number of labels, but all tokens are routed and counted.
Expected: the mean over the tokens that are routed, 1.503. Actual: 3.005.
"""

import torch
from olmo_core.nn.moe.v2.router import MoERouterConfigV2

router = MoERouterConfigV2(d_model=8, num_experts=8, top_k=2, lb_loss_weight=1.0).build()
router.weight.data.copy_(torch.eye(8).flatten())
x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(9))[0] + torch.linspace(0.8, -0.8, 8)


def loss(labels):
    labels = torch.tensor(labels)
    return router.compute_aux_loss(*router(x, False, loss_div_factor=labels)[-1]).item()


print(f"expected {loss(16):.4g} (16 tokens are routed), got {loss(8):.4g} (8 of them have labels)")
