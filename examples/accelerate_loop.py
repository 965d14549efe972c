"""Pretrains a small Qwen3-MoE in a loop over Accelerate, without balancing and with it, on one process or several.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py    # on CPUs, set ACCELERATE_USE_CPU=true

A loop over Accelerate needs equipoise.attach after prepare, and two lines. The text is the corpus that is packaged
with equipoise, as bytes. The processes share the micro-batches of a step. The table at the end is about held-out text:
without balancing a few experts take most of the tokens. Takes about half a minute on one core of a CPU.
"""

import argparse
import json
import lzma
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import equipoise
import equipoise_lab
from equipoise import metrics

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
LENGTH, ROWS = 64, 8
MICRO_BATCHES = 4  # in a step, of all processes together


def read_rows(bytes_per_domain: int) -> Tensor:
    """Rows of bytes from all eight domains of the corpus, in random order."""
    text = bytearray()
    for file in sorted(CORPUS.glob("*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            text += "\n".join(json.loads(line)["text"] for line in lines).encode()[:bytes_per_domain]
    rows = torch.frombuffer(text, dtype=torch.uint8).long()
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def make_model() -> nn.Module:
    sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=2)  # softmax scores
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def pretrain(strategy: str, train_rows: Tensor, held_out: Tensor, accelerator: Accelerator) -> tuple[float, ...]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loaders = DataLoader(train_rows, batch_size=ROWS), DataLoader(held_out, batch_size=ROWS)
    model, optimizer, train_data, held_out_data = accelerator.prepare(model, optimizer, *loaders)

    balance = equipoise.attach(model, strategy)
    step = 0
    for micro_batch in train_data:
        with accelerator.accumulate(model):
            loss = model(input_ids=micro_batch, labels=micro_batch).loss + balance.loss()
            accelerator.backward(loss)  # divides by the number of micro-batches
            optimizer.step()  # acts only after the last micro-batch, like zero_grad
            optimizer.zero_grad()
        if accelerator.sync_gradients:  # the last micro-batch; fp16 may have skipped the step
            balance.step(applied=not accelerator.optimizer_step_was_skipped)
            step += 1
            accelerator.print(f"{strategy}: step {step}: MaxVio {balance.metrics()['maxvio_batch']:.2f}")

    with torch.no_grad(), balance.measuring() as load:  # over all processes
        losses = [model(input_ids=rows, labels=rows).loss for rows in held_out_data]
    loss = accelerator.gather(torch.stack(losses)).mean()
    accelerator.free_memory()
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run (default: 150)")
    parser.add_argument("--strategy", default="lbl:scope=global_batch,coefficient=1e-2", help="compared with none")
    parser.add_argument("--smoke", action="store_true", help="3 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps, num_held_out = (3, 32) if options.smoke else (options.steps, 512)

    accelerator = Accelerator()
    accelerator.gradient_accumulation_steps = max(1, MICRO_BATCHES // accelerator.num_processes)
    rows = read_rows(10_000 if options.smoke else 300_000)
    held_out, train_rows = rows[:num_held_out], rows[num_held_out:][: steps * MICRO_BATCHES * ROWS]
    table = {name: pretrain(name, train_rows, held_out, accelerator) for name in ("none", options.strategy)}
    accelerator.print(f"\n{'strategy':42} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
    for name, (max_violation, dead_experts, loss) in table.items():
        accelerator.print(f"{name:42} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")
    accelerator.end_training()  # destroys the process groups; without it a rank may abort as it exits


if __name__ == "__main__":
    main()
