"""The load-balancing loss of a micro-batch that is all padding is nan.

Transformers 5.24.0, load_balancing_loss_func of modeling_qwen3_moe.py divides by the number of unmasked tokens.
Expected: 0. Actual: nan, which an optimizer's step writes into every weight.
"""

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
loss = load_balancing_loss_func((logits,), num_experts=8, top_k=2, attention_mask=torch.zeros(2, 8))
loss.backward()
print("expected: 0, with a gradient of 0")
print("actual:  ", float(loss.detach()), "with a gradient of", float(logits.grad.abs().max()))
