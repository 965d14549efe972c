"""MoERouterV2 counts padding for its score bias. ai2-olmo-core 3.0.0, torch 2.13, CPU.

No mask reaches the router. Expected: the update of the tokens that are text. Actual: that of text and padding.
"""

import torch
from olmo_core.nn.moe.v2.router import MoERouterConfigV2


def update(x):
    router = MoERouterConfigV2(d_model=8, num_experts=8, top_k=2, bias_gamma=1e-3, gating_function="sigmoid").build()
    router.weight.data.copy_(torch.eye(8).flatten())
    router.compute_aux_loss(*router(x, False)[-1])
    router.post_batch()
    return [round(value / 1e-3) for value in router.score_bias.tolist()]


def rows_of(number, seed):
    return torch.randn(1, number, 8, 8, generator=torch.Generator().manual_seed(seed))[0] + torch.linspace(0.8, -0.8, 8)


rows = rows_of(2, 54)
rows[1, 4:] = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])  # padding: the same token in each place
text = torch.cat([rows[0], rows[1, :4]])[None]
print(f"rows of 8 and 4 tokens: expected {update(text)}, got {update(rows)}")
row = rows_of(1, 55)
print(f"a row of 5 tokens: expected {update(row[:, :5])}, got {update(row)}")
