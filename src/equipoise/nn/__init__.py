"""A router and a mixture-of-experts layer for models of your own; ``attach`` recognises them.

A model and its training loop:

    import torch
    from torch import nn

    import equipoise
    from equipoise.nn import MoE

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm, self.moe = nn.RMSNorm(dim), MoE(dim, hidden=32, num_experts=8, k=2, num_shared=1)

        def forward(self, x):
            return x + self.moe(self.norm(x))

    model = nn.Sequential(nn.Embedding(256, 64), Block(64), Block(64), nn.Linear(64, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    balance = equipoise.attach(model, equipoise.LossFree(), equipoise.LoadBalancingLoss(1e-4, scope="sequence"))
    for ids in torch.randint(256, (3, 4, 33)):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        (loss + balance.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
"""

from equipoise.nn.moe import MoE
from equipoise.nn.router import Router

__all__ = ["MoE", "Router"]
