"""Pretrains a small mixture-of-experts model with OLMo-core's own trainer, without balancing and with it.

    pip install ai2-olmo-core
    python examples/olmo_core_loop.py
    python examples/olmo_core_loop.py --strategy lbl:scope=global_batch,coefficient=1e-2

The model is a transformer over bytes with OLMo-core's MoE in every layer; the text is the corpus that is packaged with
equipoise. OLMo-core copies tokens to experts by kernels for a GPU; without one this script copies them by indexing. The
table at the end is about held-out text. Takes about a minute on one core of a CPU.
"""

import argparse
import json
import logging
import lzma
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from olmo_core.data.data_loader import DataLoaderBase
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.ops import moe as ops
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.train_module import TransformerTrainModuleConfig
from torch import Tensor

import equipoise_lab
from equipoise import metrics
from equipoise.integrations.olmo_core import EquipoiseCallback

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
LENGTH, EXPERTS, ROWS, MICRO_BATCH, HELD_OUT = 64, 16, 16, 8, 256


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    return x[indices.long() // top_k]


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    if weights is not None:
        x = x * weights.reshape(-1)[indices.long(), None]
    return torch.zeros_like(x).index_copy(0, indices.long(), x).view(-1, top_k, x.shape[-1]).sum(1)


class Rows(DataLoaderBase):
    """Batches of random rows of bytes."""

    def __init__(self, rows: Tensor, steps: int, folder: str):
        super().__init__(work_dir=folder, global_batch_size=ROWS * LENGTH)
        self.rows, self.steps = rows, steps

    @property
    def total_batches(self) -> int:
        return self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"batches_processed": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches_processed = state_dict["batches_processed"]

    def reshuffle(self, epoch: int | None = None, **kwargs: Any) -> None:
        self._epoch = epoch or 1

    def _iter_batches(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(1)  # the same order of text for every strategy
        for _ in range(self.steps):
            yield {"input_ids": self.rows[torch.randint(len(self.rows), (ROWS,), generator=generator)]}

    def get_mock_batch(self) -> dict[str, Any]:
        return {"input_ids": self.rows[:ROWS]}


def read_rows(bytes_per_domain: int) -> Tensor:
    """Rows of bytes from all eight domains of the corpus, in random order."""
    text = bytearray()
    for file in sorted(CORPUS.glob("*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            domain = "\n".join(json.loads(line)["text"] for line in lines)
        text += domain.encode()[:bytes_per_domain]
    rows = torch.frombuffer(text, dtype=torch.uint8).long()
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def pretrain(strategy: str, rows: Tensor, steps: int) -> tuple[float, float, float]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    torch.manual_seed(0)  # the same weights for every strategy
    model = TransformerConfig.llama_like_moe(
        d_model=64,
        vocab_size=256,
        n_layers=2,
        n_heads=2,
        num_experts=EXPERTS,
        top_k=2,
        expert_hidden_size=32,
        dropless=True,
        lb_loss_weight=None,  # OLMo-core's own losses
        z_loss_weight=None,
        attn_backend="torch",
    ).build()
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=MICRO_BATCH * LENGTH, max_sequence_length=LENGTH, optim=AdamWConfig(lr=3e-3)
    ).build(model)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(save_folder=folder, max_duration=Duration.epochs(1), no_checkpoints=True)
        config = config.with_callback("equipoise", EquipoiseCallback(strategy))
        trainer = config.build(module, Rows(rows[HELD_OUT:], steps, folder))
        trainer.fit()
    balance = trainer.callbacks["equipoise"].balance
    print(f"{strategy}: {balance.num_windows} steps, MaxVio of the last {balance.metrics()['maxvio_batch']:.2f}")
    held_out = rows[:HELD_OUT].to(module.device)
    labels = torch.nn.functional.pad(held_out[:, 1:], (0, 1), value=-100)
    model.eval()
    with torch.no_grad(), balance.measuring() as load:
        loss = model(held_out, labels=labels).loss
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run (default: 100)")
    parser.add_argument("--strategy", default="loss-free:rate=0.005", help="compared with none (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="3 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps = 3 if options.smoke else options.steps

    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Grouped GEMM not available")
    if not torch.cuda.is_available():
        ops.gather, ops.scatter = gather, scatter
    rows = read_rows(bytes_per_domain=10_000 if options.smoke else 300_000)
    table = {strategy: pretrain(strategy, rows, steps) for strategy in ("none", options.strategy)}
    print(f"\n{'strategy':45} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
    for strategy, (max_violation, dead_experts, loss) in table.items():
        print(f"{strategy:45} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")


if __name__ == "__main__":
    main()
