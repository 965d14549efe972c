"""Under gradient accumulation, Trainer multiplies the load-balancing loss by the number of micro-batches.

Transformers 5.24.0: a model that takes num_items_in_batch divides its cross-entropy by it, so training_step does not
divide the loss by the accumulation steps. The load-balancing loss in it is a mean for each micro-batch, and is summed.
Expected: the same gradient at the gate for 1 and 4 micro-batches of the same tokens. Actual: 4 times as strong.
"""

import tempfile

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 8}
heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
moe = {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0, "output_router_logits": True}
row = {"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}


def gradient(accumulation_steps):
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **moe))
    torch.nn.init.zeros_(model.model.layers[0].mlp.experts.down_proj)  # cross-entropy then has no gradient at the gate
    options = {"gradient_accumulation_steps": accumulation_steps, "max_grad_norm": 0.0, "learning_rate": 0.0}
    more = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    options |= {"per_device_train_batch_size": 1, **more}
    trainer = Trainer(model, TrainingArguments(tempfile.mkdtemp(), **options), train_dataset=[row] * accumulation_steps)
    norms = []
    gate = model.model.layers[0].mlp.gate.weight
    trainer.create_optimizer().register_step_pre_hook(lambda *_: norms.append(gate.grad.norm().item()))
    trainer.train()
    return norms[0]


print("expected: the same norm. Actual:", {steps: round(gradient(steps), 5) for steps in (1, 2, 4)})
