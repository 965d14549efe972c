"""With k = 2, DeepSpeed's MoE layer ignores used_token: padding counts in l_aux.

DeepSpeed 0.19.8, TopKGate.forward of moe/sharded_moe.py passes used_token to top1gating only; topkgating, for k > 2,
does not take it either. Expected: l_aux of a batch with padding is that of its tokens alone. Actual: padding counts.
"""

import torch
from deepspeed.moe.sharded_moe import TopKGate

logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0.8, -0.8, 8)
used = (torch.arange(16) % 8 < 4).long()  # the second half of each row of 8 is padding
options = {"drop_tokens": False, "use_rts": False, "min_capacity": 0, "top2_2nd_expert_sampling": False}
for k in (1, 2, 3):
    gate = TopKGate(8, 8, k=k, **options)
    torch.nn.init.eye_(gate.wg.weight)
    with torch.no_grad():
        without_padding = float(gate(logits[used.bool()])[0])
        masked, all_tokens = float(gate(logits, used)[0]), float(gate(logits)[0])
    print(f"k={k}: expected {without_padding:.4f}, actual {masked:.4f}; without used_token {all_tokens:.4f}")
