"""router_aux_loss_coef alone adds no load-balancing loss, and nothing says so.

Transformers 5.24.0, Qwen3MoeForCausalLM: the loss is computed only with output_router_logits=True, whose default is
False. Expected: a loss that depends on the coefficient, or a warning. Actual: the same loss. See #44242.
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

ids = torch.arange(1, 17).reshape(2, 8)
for switch in (False, True):
    for coefficient in (0.0, 100.0):
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        moe = {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": coefficient}
        if switch:
            moe["output_router_logits"] = True
        output = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **moe))(input_ids=ids, labels=ids)
        print(f"output_router_logits={switch!s:5} coefficient {coefficient:5}: loss {output.loss.item():8.3f}")
print("expected: the coefficient changes the loss, or a warning says that it does not")
