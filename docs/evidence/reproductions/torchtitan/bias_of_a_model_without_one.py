"""The default configuration of Qwen3 MoE moves an expert bias. torchtitan 0.3.0, torch 2.13, CPU.

Qwen3 MoE was trained with a loss and has no bias. make_moe_config has the rate 1e-3 by default, and the configurations
of Qwen3 do not set it. Training that goes on from a published checkpoint changes the routing step by step.
Expected: no rate. Actual: 0.001 in each layer.
"""

from torchtitan.models import qwen3
from torchtitan.models.common import MoE

for name in ("30B-A3B", "235B-A22B"):
    rates = {moe.load_balance_coeff for _, moe, _, _ in qwen3.model_registry(name).model.traverse(MoE.Config)}
    print(f"{name}: expected {{None}}, got {rates}")
