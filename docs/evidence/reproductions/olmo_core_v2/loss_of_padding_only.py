"""The balancing loss of a batch without labels is 19.92. ai2-olmo-core 3.0.0, torch 2.13, CPU.

OLMoDDPTrainModule.train_batch divides by the number of labels, at least 1. A batch that is all padding has none.
Expected: 0, as nothing is text. Actual: 19.92.
"""

import torch
from olmo_core.nn.moe.v2.router import MoERouterConfigV2

router = MoERouterConfigV2(d_model=8, num_experts=8, top_k=2, lb_loss_weight=1.0).build()
router.weight.data.copy_(torch.eye(8).flatten())
x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(8))[0] + torch.linspace(0.8, -0.8, 8)
labels = torch.tensor(0).clamp_min(1)  # as in train_batch: (batch["labels"] != -100).sum().clamp_min(1)
value = router.compute_aux_loss(*router(x, False, loss_div_factor=labels)[-1])
value.backward()
print(f"expected 0, got {value.item():.4g}; largest gradient {router.weight.grad.abs().max():.4g}")
