"""Closed expert groups win against negative scores. litgpt 0.5.13, torch 2.13, CPU.

GroupedTopkRouter.get_topk_indices fills the biased scores of closed groups with 0.0. If the scores of open groups are
negative, 0.0 is larger. DeepSeek-V3's own code fills with -inf.
A bias that is the same for all experts changes no choice. Expected: the same experts.
Actual: none of 16 tokens has them.
"""

import torch
from litgpt import Config
from litgpt.model import GroupedTopkRouter

groups = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_expert": 8, "n_expert_per_token": 2, "norm_topk_prob": True}
router = GroupedTopkRouter(Config(**sizes, **groups, mlp_class_name="LLaMAMoE", moe_intermediate_size=8))
torch.nn.init.eye_(router.weight)

generator = torch.Generator().manual_seed(101)
tokens = torch.randn(1, 2, 8, 8, generator=generator).reshape(16, 8) + torch.linspace(0.8, -0.8, 8)
without = router(tokens)[1].sort().values
router.e_score_correction_bias -= 2
shifted = router(tokens)[1].sort().values
print(f"expected 16 of 16 tokens, got {int((without == shifted).all(-1).sum())}")
