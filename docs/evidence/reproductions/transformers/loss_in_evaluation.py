"""The evaluation loss of an MoE model holds its load-balancing loss, so exp(eval_loss) is no perplexity.

Transformers 5.24.0: forward adds the loss in every mode, and Trainer.evaluate reports it. Expected: eval_loss is the
cross-entropy. Actual: cross-entropy plus router_aux_loss_coef times the load-balancing loss.
"""

import tempfile

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 8}
heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
moe = {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0, "output_router_logits": True}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **moe))
row = {"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}
arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to=[], disable_tqdm=True)
reported = Trainer(model, arguments, eval_dataset=[row]).evaluate()["eval_loss"]
with torch.no_grad():
    batch = {name: value[None] for name, value in row.items()}
    cross_entropy = model(**batch, output_router_logits=False).loss.item()
    aux_loss = model(**batch).aux_loss.item()
print(f"expected, the cross-entropy: {cross_entropy:.4f}")
print(f"actual, eval_loss:           {reported:.4f} = {cross_entropy:.4f} + 1.0 * {aux_loss:.4f}")
