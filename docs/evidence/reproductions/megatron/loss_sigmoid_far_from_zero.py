"""The load-balancing loss of a sigmoid router falls below its minimum when all scores are small.

Megatron-Core 0.19.2, compute_routing_scores_for_aux_loss: scores / (scores.sum() + 1e-20). Sigmoids of -50 are 2e-22.
Expected: 1, as the load is even and shares do not depend on the level of the logits. Actual: 0.237. Issue #1545.
"""

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
)

for level in (0.0, -50.0):
    logits = torch.full((16, 8), level)
    for token in range(16):  # prefers the experts t and t + 1, modulo 8: each expert has 4 of 32 places
        logits[token, token % 8] += 2
        logits[token, (token + 1) % 8] += 1
    routing_map, scores = compute_routing_scores_for_aux_loss(logits, 2, "sigmoid")
    loss = switch_load_balancing_loss_func(scores, routing_map.sum(0), 16, 2, 8, 1.0)
    print(f"logits near {level:5}: expected 1, actual {loss:.4g}")
