"""A training loop with Accelerate. It needs only ``equipoise.attach``, after ``prepare``.

python examples/accelerate_loop.py
torchrun --nproc-per-node 2 examples/accelerate_loop.py    # on CPUs, set ACCELERATE_USE_CPU=true
"""

import torch
import transformers
from accelerate import Accelerator

import equipoise

MICRO_BATCHES = 4  # per step, on each rank


def main(steps: int = 3) -> list[float]:
    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, head_dim=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(64, (steps * MICRO_BATCHES * accelerator.num_processes * 2, 16))
    model, optimizer, data = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows, batch_size=2))

    balance = equipoise.attach(model, "loss-free:rate=1e-2", "lbl:scope=sequence,coefficient=1e-4")
    violations = []
    for micro_batch in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=micro_batch, labels=micro_batch).loss + balance.loss()
            accelerator.backward(loss)  # divides by MICRO_BATCHES
            optimizer.step()  # acts only after the last micro-batch, like zero_grad
            optimizer.zero_grad()
        if accelerator.sync_gradients:  # the last micro-batch; fp16 may have skipped the step
            balance.step(applied=not accelerator.optimizer_step_was_skipped)
            violations.append(balance.metrics()["maxvio_batch"])
            accelerator.print(f"step {len(violations)}: MaxVio {violations[-1]:.2f}")
    accelerator.end_training()  # destroys the process groups; without it a rank may abort as it exits
    return violations


if __name__ == "__main__":
    main()
