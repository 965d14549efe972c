"""The balancing loss of a batch without labels is inf. ai2-olmo-core 3.0.0, torch 2.13, CPU.

TransformerTrainModule.train_batch divides by the number of labels. A batch that is all padding has none.
Expected: 0, as nothing is text. Actual: inf.
"""

import torch
from olmo_core.nn.moe.router import MoERouterConfig

router = MoERouterConfig(top_k=2).build(8, 8, lb_loss_weight=1.0)
router.weight.data.copy_(torch.eye(8).flatten())
x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(8))[0] + torch.linspace(0.8, -0.8, 8)
labels = torch.tensor(0)  # as in train_batch: (batch["labels"] != -100).sum()
value = router(x, loss_div_factor=labels)[-1]
value.backward()
print(f"expected 0, got {value.item():.4g}; largest gradient {router.weight.grad.abs().max():.4g}")
