"""MoERouter counts padding in its load-balancing loss. ai2-olmo-core 3.0.0, torch 2.13, CPU.

The loss is called as by MoEBase.forward; loss_div_factor is the number of labels, as in
TransformerTrainModule.train_batch. Expected: what the tokens that are text give alone. Actual: padding is in the
counts and in the mean of the scores.
"""

import torch
from olmo_core.nn.moe.router import MoERouterConfig


def loss(lengths, of, seed, k, padded, divisor=None):
    """The loss, and its gradient at the gate, which is the identity. Rows are padded to the same length."""
    rows = torch.randn(1, len(lengths), of, 8, generator=torch.Generator().manual_seed(seed))[0]
    rows += torch.linspace(0.8, -0.8, 8)
    x = rows if padded else torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])[None]
    router = MoERouterConfig(top_k=k).build(8, 8, lb_loss_weight=1.0)
    router.weight.data.copy_(torch.eye(8).flatten())
    labels = torch.tensor(float(divisor or sum(lengths)))
    value = router(x, loss_div_factor=labels)[-1]
    value.backward()
    return value.item(), router.weight.grad


def distance(ours, right):
    return float((ours - right).norm() / right.norm())


gradients = [loss((8, 4), 8, 6, 2, padded)[1] for padded in (True, False)]
print(f"rows of 8 and 4 tokens, gradient: expected distance 0, got {distance(*gradients):.3f}")
values = [loss((4, 4), 8, 7, 1, padded)[0] for padded in (False, True)]
print("rows of 4 and 4 tokens, top 1: expected {:.4g}, got {:.4g}".format(*values))
windows = [sum(loss((n,), 6, 23 + i, 2, padded, 12)[1] for i, n in enumerate((6, 2, 4))) for padded in (True, False)]
print(f"micro-batches of 6, 2 and 4 tokens, gradient: expected distance 0, got {distance(*windows):.3f}")
