"""A training loop over Accelerate: nothing but ``equipoise.attach``, after ``prepare``.

python examples/accelerate_loop.py
torchrun --nproc-per-node 2 examples/accelerate_loop.py    # on CPUs with ACCELERATE_USE_CPU=true before it
"""

import torch
import transformers
from accelerate import Accelerator

import equipoise

ACCUMULATED = 4  # micro-batches of a step, on each rank


def main(steps: int = 3) -> list[float]:
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, head_dim=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(64, (steps * ACCUMULATED * accelerator.num_processes * 2, 16))
    model, optimizer, data = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows, batch_size=2))

    balance = equipoise.attach(model, "loss-free:rate=1e-2", "lbl:scope=sequence,coefficient=1e-4")
    violations = []
    for micro_batch in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=micro_batch, labels=micro_batch).loss + balance.loss()
            accelerator.backward(loss)  # divides by ACCUMULATED
            optimizer.step()  # acts on the last micro-batch only, as zero_grad does
            optimizer.zero_grad()
        if accelerator.sync_gradients:  # that was the last: fp16 may have skipped the step
            balance.step(applied=not accelerator.optimizer_step_was_skipped)
            violations.append(balance.metrics()["maxvio_batch"])
            accelerator.print(f"step {len(violations)}: MaxVio {violations[-1]:.2f}")
    accelerator.end_training()  # gives the process groups back; without it a rank may abort as it ends
    return violations


if __name__ == "__main__":
    main()
