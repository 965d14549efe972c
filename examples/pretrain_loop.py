"""Pretrains a small mixture-of-experts model in a plain PyTorch loop, without balancing and with it.

    python examples/pretrain_loop.py
    python examples/pretrain_loop.py --strategy quantile

The model is a transformer over bytes with equipoise.nn.MoE in every layer. The text is the corpus that is packaged with
equipoise. The table at the end is about held-out text: without balancing a few experts take most of the tokens, and
some experts are dead. Takes about half a minute on one core of a CPU.
"""

import argparse
import json
import lzma
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise
import equipoise_lab
from equipoise import metrics

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
LENGTH, WIDTH, LAYERS = 64, 64, 2
ROWS, MICRO_BATCHES, HELD_OUT = 16, 2, 512


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query_key_value, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = equipoise.nn.MoE(WIDTH, hidden=32, num_experts=32, k=2, num_shared=1)  # sigmoid scores

    def forward(self, x: Tensor) -> Tensor:
        projected = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, 2, WIDTH // 2))  # 2 heads
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.moe(self.moe_norm(x))


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, rows: Tensor) -> Tensor:
        """The mean cross-entropy of each next byte, for rows [batch, LENGTH + 1]."""
        logits = self.head(self.layers(self.byte(rows[:, :-1]) + self.position.weight))
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def read_rows(bytes_per_domain: int) -> Tensor:
    """Rows of bytes from all eight domains of the corpus, in random order."""
    text = bytearray()
    for file in sorted(CORPUS.glob("*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            domain = "\n".join(json.loads(line)["text"] for line in lines)
        text += domain.encode()[:bytes_per_domain]
    rows = torch.frombuffer(text, dtype=torch.uint8).long()
    rows = rows[: len(rows) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return rows[torch.randperm(len(rows))]


def pretrain(strategy: str, rows: Tensor, steps: int) -> tuple[float, float, float]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    torch.manual_seed(1)  # the same weights and the same order of text for every strategy
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balance = equipoise.attach(model, strategy)
    for step in range(1, steps + 1):
        for micro_batch in rows[torch.randint(HELD_OUT, len(rows), (MICRO_BATCHES, ROWS))]:
            loss = model(micro_batch)
            ((loss + balance.loss()) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        if step % max(1, steps // 4) == 0:
            print(f"{strategy}: step {step}: loss {loss.item():.3f}, MaxVio {balance.metrics()['maxvio_batch']:.2f}")
    with torch.no_grad(), balance.measuring() as load:
        loss = model(rows[:HELD_OUT])
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    parser.add_argument("--strategy", help="compared with none (default: loss-free at a rate of 1 / steps)")
    parser.add_argument("--smoke", action="store_true", help="4 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps = 4 if options.smoke else options.steps
    strategies = ("none", options.strategy or f"loss-free:rate={1 / steps:g}")

    torch.manual_seed(0)
    rows = read_rows(bytes_per_domain=10_000 if options.smoke else 300_000)
    table = {strategy: pretrain(strategy, rows, steps) for strategy in strategies}
    print(f"\n{'strategy':40} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
    for strategy, (max_violation, dead_experts, loss) in table.items():
        print(f"{strategy:40} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")


if __name__ == "__main__":
    main()
