"""The instance loss takes a row as one sequence, also where it packs two documents. ai2-olmo-core 3.0.0, torch 2.13.

Granularity "instance" says that it is by instance, and no part of the batch (doc_lens, cu_doc_lens) reaches the router.
Expected, for a loss within sequences: f and P of each document. Actual: of each row.
"""

import torch
from olmo_core.nn.moe.router import MoERouterConfig

x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(11))[0] + torch.linspace(0.8, -0.8, 8)
labels = torch.tensor(16)


def gradient(x):
    router = MoERouterConfig(top_k=2).build(8, 8, lb_loss_weight=1.0, lb_loss_granularity="instance")
    router.weight.data.copy_(torch.eye(8).flatten())
    router(x, loss_div_factor=labels)[-1].backward()
    return router.weight.grad


packed, apart = gradient(x), gradient(x.reshape(4, 4, 8))  # two rows of two documents; four documents
print(f"expected distance 0, got {(packed - apart).norm() / apart.norm():.3f}")
