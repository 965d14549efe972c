"""A micro-batch of padding alone has a load-balancing loss at k = 2, and a gradient at the gate.

DeepSpeed 0.19.8: TopKGate.forward of moe/sharded_moe.py does not pass used_token to top2gating. Expected: 0, and no
gradient. Actual: the loss of the padding.
"""

import torch
from deepspeed.moe.sharded_moe import TopKGate

logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0.8, -0.8, 8)
gate = TopKGate(8, 8, k=2, drop_tokens=False, use_rts=False, min_capacity=0, top2_2nd_expert_sampling=False)
torch.nn.init.eye_(gate.wg.weight)
l_aux = gate(logits, torch.zeros(16, dtype=torch.long))[0]
l_aux.backward()
print(f"expected 0 and 0, actual {l_aux.item():.4f} and a gradient of {gate.wg.weight.grad.norm().item():.4f}")
