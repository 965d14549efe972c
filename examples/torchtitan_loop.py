"""Pretrains torchtitan's debug model of DeepSeek-V3 by its own Trainer, without balancing and with it.

    pip install torchtitan==0.3.0
    python examples/torchtitan_loop.py
    python examples/torchtitan_loop.py --strategy "loss-free:rate=1e-3"
    torchrun --nproc-per-node 2 examples/torchtitan_loop.py

The text is the corpus that is packaged with equipoise, byte by byte. The table at the end is about held-out text.
Without a GPU a few things of torchtitan are replaced, in use_cpu(). Takes about two minutes on one core of a CPU.
"""

import argparse
import json
import lzma
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torchtitan.tools.utils
from torch import Tensor

import equipoise_lab
from equipoise import metrics
from equipoise.integrations.torchtitan import balanced

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
LENGTH, ROWS, ACCUMULATION, LAYERS, HELD_OUT = 64, 8, 2, 2, 64


def use_cpu() -> None:
    """Replaces what torchtitan has for GPUs only. To be called before its Trainer is imported."""
    torchtitan.tools.utils.device_type, torchtitan.tools.utils.device_module = "cpu", torch.cpu
    import torchtitan.components.metrics as titan_metrics
    import torchtitan.distributed.fsdp as titan_fsdp
    import torchtitan.distributed.utils as titan_distributed

    statistics = titan_metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)
    monitor = SimpleNamespace(device_name="cpu", get_peak_stats=lambda: statistics, reset_peak_stats=lambda: None)
    titan_metrics.build_device_memory_monitor = lambda: monitor
    titan_distributed.set_pg_timeouts = lambda **_: None  # its barrier names a GPU
    own = titan_fsdp.disable_fsdp_gradient_division

    def sum_gradients(model: Any) -> None:  # gloo cannot scale in a reduction
        own(model)
        for module in model.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)

    titan_fsdp.disable_fsdp_gradient_division = sum_gradients


if not torch.cuda.is_available():
    use_cpu()

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config.configs import ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.models import deepseek_v3  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import MoE  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

deepseek_v3.get_attention_config = lambda _: ScaledDotProductAttention.Config()  # a row is one document


def read_rows(bytes_per_domain: int) -> Tensor:
    """Rows of bytes from all eight domains of the corpus, in random order."""
    text = bytearray()
    for file in sorted(CORPUS.glob("*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            domain = "\n".join(json.loads(line)["text"] for line in lines)
        text += domain.encode()[:bytes_per_domain]
    rows = torch.frombuffer(text, dtype=torch.uint8).long()
    rows = rows[: len(rows) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def split(rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What torchtitan's data loaders give: inputs and their positions, and labels."""
    return {"input": rows[:, :-1], "positions": torch.arange(LENGTH).repeat(len(rows), 1)}, rows[:, 1:].contiguous()


class Bytes(BaseDataLoader):
    """Micro-batches of random rows, beyond those that are held out."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        bytes_per_domain: int = 300_000

    def __init__(self, config: Any, *, dp_rank: int, local_batch_size: int, **_: Any):
        self.rows, self.size = read_rows(config.bytes_per_domain)[HELD_OUT:], local_batch_size
        self.generator = torch.Generator().manual_seed(dp_rank)

    def __iter__(self) -> Any:
        while True:
            yield split(self.rows[torch.randint(len(self.rows), (self.size,), generator=self.generator)])

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class NoTokenizer(BaseTokenizer):
    """Bytes are tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any = None, **_: Any):
        self.eos_id = 0

    def encode(self, text: str, **_: Any) -> list[int]:
        return [*text.encode()]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode()

    def get_vocab_size(self) -> int:
        return 256


def make_config(steps: int, bytes_per_domain: int, folder: str) -> Any:
    """A config of torchtitan's Trainer, as a function of a config registry makes it."""
    spec = deepseek_v3.model_registry("debugmodel", attn_backend="flex")
    spec.model.layers = spec.model.layers[:LAYERS]
    for _, moe, _, _ in spec.model.traverse(MoE.Config):
        moe.load_balance_coeff = None  # else torchtitan balances the run without a strategy
    ranks = int(os.environ["WORLD_SIZE"])
    config = Trainer.Config(
        model_spec=spec,
        tokenizer=NoTokenizer.Config(),
        dataloader=Bytes.Config(bytes_per_domain=bytes_per_domain),
        optimizer=default_adamw(lr=2e-3),
        training=TrainingConfig(
            local_batch_size=ROWS,
            global_batch_size=ROWS * ACCUMULATION * ranks,
            seq_len=LENGTH,
            steps=steps,
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),  # the default needs a newer torch than 2.13
        loss=CrossEntropyLoss.Config(),
        activation_checkpoint=None,
        dump_folder=folder,
    )
    config.debug = replace(config.debug, seed=0, enable_structured_logging=False)
    config.metrics.log_freq, config.lr_scheduler.warmup_steps = max(1, steps // 4), steps // 10
    return config


def pretrain(strategy: str, steps: int, bytes_per_domain: int) -> tuple[float, float, float]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = balanced(make_config(steps, bytes_per_domain, folder), strategy).build()
        (model,), (balance,) = trainer.model_parts, trainer.balances
        log = trainer.metrics_processor.log

        def print_and_log(step: int, loss: float, *args: Any, **kwargs: Any) -> None:
            log(step, loss, *args, **kwargs)
            print(f"{strategy}: step {step}: loss {loss:.3f}, MaxVio {balance.metrics()['maxvio_batch']:.2f}")

        trainer.metrics_processor.log = print_and_log
        trainer.train()
        inputs, labels = split(read_rows(bytes_per_domain)[:HELD_OUT])
        with torch.no_grad(), balance.measuring() as load:
            logits = model(inputs["input"].to(trainer.device), positions=inputs["positions"].to(trainer.device))
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.to(trainer.device).flatten())
        trainer.close()
        torch.distributed.destroy_process_group()
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run (default: 60)")
    parser.add_argument("--strategy", help="compared with none (default: lbl over the global batch)")
    parser.add_argument("--smoke", action="store_true", help="4 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps, size = (4, 10_000) if options.smoke else (options.steps, 300_000)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({name: value for name, value in alone.items() if "RANK" not in os.environ})

    strategies = ("none", options.strategy or "lbl:scope=global_batch,coefficient=1e-2")
    table = {strategy: pretrain(strategy, steps, size) for strategy in strategies}
    if os.environ["RANK"] != "0":
        return
    print(f"\n{'strategy':40} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
    for strategy, (max_violation, dead_experts, loss) in table.items():
        print(f"{strategy:40} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")


if __name__ == "__main__":
    main()
