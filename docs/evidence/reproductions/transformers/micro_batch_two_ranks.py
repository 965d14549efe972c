"""Trainer multiplies the load-balancing loss by the number of data-parallel ranks. Issue #48690.

Transformers 5.24.0, average_tokens_across_devices=True (the default): compute_loss multiplies the whole loss by the
ranks, as the cross-entropy was divided by the tokens of all ranks. The load-balancing loss was not.
Expected: the same gradient at the gate on 1 and 2 ranks with the same rows. Actual: twice as strong.
    python micro_batch_two_ranks.py; torchrun --nproc-per-node 2 micro_batch_two_ranks.py
"""

import os
import tempfile

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 8}
heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
moe = {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0, "output_router_logits": True}
row = {"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}  # the same on all ranks

torch.manual_seed(0)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **moe))
torch.nn.init.zeros_(model.model.layers[0].mlp.experts.down_proj)  # cross-entropy then has no gradient at the gate
options = {"max_grad_norm": 0.0, "learning_rate": 0.0, "use_cpu": True, "report_to": [], "disable_tqdm": True}
options |= {"per_device_train_batch_size": 1, "save_strategy": "no", "max_steps": 1}
trainer = Trainer(model, TrainingArguments(tempfile.mkdtemp(), **options), train_dataset=[row] * 2)
gate = model.model.layers[0].mlp.gate.weight
trainer.create_optimizer().register_step_pre_hook(
    lambda *_: print(f"{os.environ.get('WORLD_SIZE', 1)} rank(s): norm at the gate {gate.grad.norm().item():.5f}")
)
trainer.train()
