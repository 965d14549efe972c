"""The load monitor does not see replayed routing. VeOmni 0.1.12, transformers 5.9.0, torch 2.13, CPU.

attach_moe_router_monitor hooks the router; Qwen3MoeSparseMoeBlock replaces its choice later, by maybe_replay_indices.
Expected: the load of the experts that the forward used. Actual: that of the router's own choice.
"""

from types import SimpleNamespace

import torch
import transformers
from veomni.arguments.arguments_types import OpsImplementationConfig
from veomni.models import build_foundation_model
from veomni.utils.moe_monitor import MoERouterMonitor, attach_moe_router_monitor, set_active_monitor
from veomni.utils.moe_router_replay import set_active_replay

names = [name for name in OpsImplementationConfig.__dataclass_fields__ if name.endswith("_implementation")]
plain = OpsImplementationConfig(**{name: "eager" for name in names if name != "qat_implementation"})
sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 8}
sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
config = transformers.AutoConfig.for_model(
    "qwen3_moe", **sizes, num_experts_per_tok=2, architectures=["Qwen3MoeForCausalLM"]
)
model = build_foundation_model(config, torch_dtype="float32", init_device="cpu", ops_implementation=plain)
block, monitor = model.model.layers[0].mlp, MoERouterMonitor(8)
torch.nn.init.eye_(block.gate.weight)
set_active_monitor(monitor)
attach_moe_router_monitor(model, monitor)

generator = torch.Generator().manual_seed(103)
tokens = torch.randn(1, 2, 8, 8, generator=generator)[0] + torch.linspace(0.8, -0.8, 8)
ids = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(104)).argsort(-1)[..., :2].reshape(16, 2)
set_active_replay(SimpleNamespace(on_router_forward=lambda gate, scores, chosen: ids))
block(tokens)
counts = (monitor.get_load_matrix()[0] * ids.numel()).round().int().tolist()
print(f"expected {torch.bincount(ids.flatten(), minlength=8).tolist()}, got {counts}")
