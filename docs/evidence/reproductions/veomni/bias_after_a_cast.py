"""Without mixed precision the expert bias is loaded as bfloat16. VeOmni 0.1.12, transformers 5.9.0, torch 2.13, CPU.

The trainer calls build_foundation_model(torch_dtype="bfloat16") if mixed_precision.enable is false. The buffer is made
in bfloat16 then, and what is loaded is rounded, though DeepSeek-V3 has it in _keep_in_fp32_modules_strict. Biases of
published models lie near 7, where bfloat16 has steps of 0.03. With mixed precision, the default, it is float32.
Expected: 6.9123, in float32. Actual: 6.90625.
"""

import tempfile

import torch
import transformers
from veomni.arguments.arguments_types import OpsImplementationConfig
from veomni.models import build_foundation_model

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
names = [name for name in OpsImplementationConfig.__dataclass_fields__ if name.endswith("_implementation")]
plain = OpsImplementationConfig(**{name: "eager" for name in names if name != "qat_implementation"})
sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts"), 8)
sizes |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4)
sizes |= dict.fromkeys(("num_hidden_layers", "n_group", "topk_group", "n_shared_experts"), 1)
sizes |= {"vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 0}
config = transformers.AutoConfig.for_model("deepseek_v3", **sizes, architectures=["DeepseekV3ForCausalLM"])
model = build_foundation_model(config, torch_dtype="float32", init_device="cpu", ops_implementation=plain)
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)
model.model.layers[0].mlp.gate.e_score_correction_bias.fill_(6.9123)
folder = tempfile.mkdtemp()
model.save_pretrained(folder)
for dtype in ("float32", "bfloat16"):
    model = build_foundation_model(folder, folder, dtype, init_device="cpu", ops_implementation=plain)
    bias = model.model.layers[0].mlp.gate.e_score_correction_bias
    print(f"{dtype}: expected 6.9123, got {bias[0].item():.6g}, {bias.dtype}")
