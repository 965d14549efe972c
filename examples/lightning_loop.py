"""Pretrains a small Qwen3-MoE under Lightning, without balancing and with it, on one process or several.

    python examples/lightning_loop.py
    python examples/lightning_loop.py --devices 2    # DDP

The LightningModule knows nothing of balancing: BalanceCallback attaches its model, adds the balancing loss to what
training_step returns, and moves the biases after each step. The text is the corpus that is packaged with equipoise, as
bytes. The table at the end is about held-out text: without balancing a few experts take most of the tokens. Takes about
a minute on one core of a CPU.
"""

import argparse
import json
import lzma
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

import equipoise_lab
from equipoise import metrics
from equipoise.integrations.lightning import BalanceCallback

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
LENGTH, ROWS = 64, 8
MICRO_BATCHES = 4  # in a step, of all processes together

warnings.filterwarnings("ignore", module="lightning")  # advice about workers of the loader


def read_rows(bytes_per_domain: int) -> Tensor:
    """Rows of bytes from all eight domains of the corpus, in random order."""
    text = bytearray()
    for file in sorted(CORPUS.glob("*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            text += "\n".join(json.loads(line)["text"] for line in lines).encode()[:bytes_per_domain]
    rows = torch.frombuffer(text, dtype=torch.uint8).long()
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


class Pretraining(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, moe_intermediate_size=32)
        heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=2)  # softmax scores
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(config).train()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def training_step(self, rows: Tensor, batch_index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=rows, labels=rows).loss
        return loss


class Progress(lightning.Callback):
    """Prints the MaxVio of each step."""

    def __init__(self, strategy: str, balancing: BalanceCallback):
        self.strategy, self.balancing, self.step = strategy, balancing, 0

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            max_violation = self.balancing.balance.metrics()["maxvio_batch"]
            if trainer.is_global_zero:
                print(f"{self.strategy}: step {self.step}: MaxVio {max_violation:.2f}")


def pretrain(strategy: str, train_rows: Tensor, held_out: Tensor, devices: int) -> tuple[float, ...]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    balancing, module = BalanceCallback(strategy), Pretraining()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=max(1, MICRO_BATCHES // devices),
        callbacks=[balancing, Progress(strategy, balancing)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train_rows, batch_size=ROWS))

    held_out = held_out[trainer.global_rank :: devices]
    with torch.no_grad(), balancing.balance.measuring() as load:  # over all processes
        losses = [module.model(input_ids=rows, labels=rows).loss for rows in held_out.split(ROWS)]
    loss = trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean")
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run (default: 150)")
    parser.add_argument("--strategy", default="lbl:scope=global_batch,coefficient=1e-2", help="compared with none")
    parser.add_argument("--devices", type=int, default=1, help="processes, each on a CPU (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="3 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps, num_held_out = (3, 32) if options.smoke else (options.steps, 512)

    rows = read_rows(10_000 if options.smoke else 300_000)
    held_out, train_rows = rows[:num_held_out], rows[num_held_out:][: steps * MICRO_BATCHES * ROWS]
    table = {name: pretrain(name, train_rows, held_out, options.devices) for name in ("none", options.strategy)}
    is_distributed = torch.distributed.is_initialized()
    if not is_distributed or torch.distributed.get_rank() == 0:
        print(f"\n{'strategy':42} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
        for name, (max_violation, dead_experts, loss) in table.items():
            print(f"{name:42} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")
    if is_distributed:
        torch.distributed.destroy_process_group()  # without it a rank may abort as it exits


if __name__ == "__main__":
    main()
