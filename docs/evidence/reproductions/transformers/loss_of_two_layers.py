"""Two MoE layers that collapse onto opposite experts look balanced to Transformers' load-balancing loss.

Transformers 5.24.0, load_balancing_loss_func of modeling_qwen3_moe.py. Counts and probabilities of all layers are
summed before they are multiplied. Expected: the mean over layers of E * sum(f * P), here 4.0. Actual: 2.0, which is
what two even layers have (top_k). Known since #28255.
"""

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

EXPERTS, K, TOKENS = 8, 2, 64
generator = torch.Generator().manual_seed(0)
half = torch.tensor([20.0] * 4 + [-20.0] * 4)  # the first four experts take all tokens
layers = tuple(torch.randn(TOKENS, EXPERTS, generator=generator) + towards for towards in (half, -half))


def one_layer(logits):
    scores = logits.double().softmax(-1)
    f = torch.zeros(EXPERTS, dtype=torch.float64)
    for token in scores.topk(K).indices.tolist():
        for expert in token:
            f[expert] += 1 / TOKENS
    return float(EXPERTS * (f * scores.mean(0)).sum())


print("expected, mean over layers:", round(sum(map(one_layer, layers)) / 2, 3))
print("actual:                    ", round(float(load_balancing_loss_func(layers, EXPERTS, K)), 3))
