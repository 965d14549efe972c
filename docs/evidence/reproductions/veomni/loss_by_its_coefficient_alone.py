"""router_aux_loss_coef alone adds no loss, and nothing says so. VeOmni 0.1.12, transformers 5.9.0, torch 2.13, CPU.

The forward of its Qwen3 MoE computes the loss if output_router_logits, which is off by default.
Expected: a balancing loss of about 2 in the loss, or a message. Actual: none.
With output_router_logits=True it is there.
"""

import torch
import transformers
from veomni.arguments.arguments_types import OpsImplementationConfig
from veomni.models import build_foundation_model

names = [name for name in OpsImplementationConfig.__dataclass_fields__ if name.endswith("_implementation")]
plain = OpsImplementationConfig(**{name: "eager" for name in names if name != "qat_implementation"})
sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 8}
sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
ids = torch.arange(16)[None]
for options in ({}, {"output_router_logits": True}):
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        **sizes,
        num_experts_per_tok=2,
        router_aux_loss_coef=1.0,
        architectures=["Qwen3MoeForCausalLM"],
        **options,
    )
    torch.manual_seed(0)
    model = build_foundation_model(config, torch_dtype="float32", init_device="cpu", ops_implementation=plain)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    output = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    print(f"{options}: loss {output.loss.item():.3f}, expected a balancing loss, got {output.aux_loss}")
