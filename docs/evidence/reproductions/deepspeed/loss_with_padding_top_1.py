"""With k = 1, used_token takes padding out of the counts of l_aux, but not out of what they are divided by.

DeepSpeed 0.19.8, top1gating of moe/sharded_moe.py: ce and me are means over all tokens, and me is over the scores of
padding too. Expected: l_aux of the tokens alone, which is 1 at balance. Actual: about half of it if half is padding.
"""

import torch
from deepspeed.moe.sharded_moe import TopKGate

even = torch.eye(8).repeat(2, 1) * 3  # 16 tokens that fill 8 experts evenly
used = (torch.arange(16) < 8).long()  # the second half is padding
gate = TopKGate(8, 8, k=1, drop_tokens=False, use_rts=False, min_capacity=0)
torch.nn.init.eye_(gate.wg.weight)
with torch.no_grad():
    print(f"expected {float(gate(even[:8])[0]):.4f}, actual {float(gate(even, used)[0]):.4f}")
