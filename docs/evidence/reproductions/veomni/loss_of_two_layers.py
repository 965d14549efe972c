"""The balancing loss pools its layers before it multiplies. VeOmni 0.1.12, transformers 5.9.0, torch 2.13, CPU.

load_balancing_loss_func of its Qwen3 MoE, and its load_balancing_loss_pytorch, count all layers together. So two layers
that use opposite halves of the experts look even. Values here are sums over layers, with 1 for each at even load.
Expected: each layer has about 2, so the sum is 4.28. Actual: 2.14, nearly that of even load.
"""

import torch
from veomni.models.transformers.qwen3_moe.generated.patched_modeling_qwen3_moe_gpu import load_balancing_loss_func
from veomni.ops.kernels.load_balancing_loss.eager import load_balancing_loss_pytorch

generator = torch.Generator().manual_seed(5)
towards = torch.tensor([[6.0] * 4 + [-6.0] * 4, [-6.0] * 4 + [6.0] * 4])[:, None]
logits = torch.randn(2, 2, 8, 8, generator=generator).reshape(2, 16, 8) + torch.linspace(0.8, -0.8, 8) + towards
for function in (load_balancing_loss_func, load_balancing_loss_pytorch):
    layers = [function((layer,), 8, 2).item() / 2 for layer in logits]
    print(f"{function.__name__}: expected {sum(layers):.4g}, got {2 * function(tuple(logits), 8, 2).item() / 2:.4g}")
