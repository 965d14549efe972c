"""Pretrains a small mixture-of-experts model with Megatron-Core, without balancing and with it.

    python examples/megatron_loop.py
    torchrun --nproc-per-node 2 examples/megatron_loop.py

The model is a GPTModel over bytes with a mixture of experts in every layer, in Megatron's DistributedDataParallel,
under its schedule and its distributed optimizer. The text is the corpus that is packaged with equipoise. The table at
the end is about held-out text. Megatron-Core needs a GPU; the tests of this example run on a CPU, with patches. Takes
about a minute and a half there. It has not run on a GPU.
"""

import argparse
import json
import lzma
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

import equipoise_lab
from equipoise import metrics
from equipoise.integrations.megatron import attach

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
LENGTH, WIDTH, LAYERS, EXPERTS = 64, 64, 2, 32
ROWS, MICRO_BATCHES, HELD_OUT = 16, 2, 128


def make_model() -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        ffn_hidden_size=32,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # no loss of Megatron's own
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,  # nor its update of the bias, in the run without balancing
        use_cpu_initialization=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    layers = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    model = GPTModel(config, layers, vocab_size=256, max_sequence_length=LENGTH)
    if torch.cuda.is_available():
        model.cuda()
    return DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)


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


def mean_loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place


def forward_step(micro_batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    rows = next(micro_batches).to("cuda" if torch.cuda.is_available() else "cpu")
    positions = torch.arange(LENGTH, device=rows.device).expand(len(rows), LENGTH)
    causal_mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=rows.device).triu(1)
    # Of padded rows: padding_mask=..., True for padding.
    return model(rows[:, :-1], positions, causal_mask, labels=rows[:, 1:].contiguous()), mean_loss


def pretrain(strategy: str, rows: Tensor, steps: int) -> tuple[float, float, float]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    torch.manual_seed(1)  # the same weights for every strategy
    model = make_model()
    options = OptimizerConfig(optimizer="adam", lr=3e-3, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(options, [model])
    model.config.grad_scale_func = optimizer.scale_loss
    balance = attach(model, strategy)
    sizes = {"seq_length": LENGTH, "micro_batch_size": ROWS}
    run = partial(get_forward_backward_func(), forward_step_func=forward_step, model=model, **sizes)
    torch.manual_seed(2 + parallel_state.get_data_parallel_rank())  # other text on every rank
    for step in range(1, steps + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        chosen = rows[torch.randint(HELD_OUT, len(rows), (MICRO_BATCHES, ROWS))]
        losses = run(data_iterator=iter(chosen), num_microbatches=MICRO_BATCHES)
        update_successful, _, _ = optimizer.step()
        balance.step(applied=update_successful)
        if step % max(1, steps // 4) == 0 and parallel_state.get_data_parallel_rank() == 0:
            max_violation = balance.metrics()["maxvio_batch"]
            print(f"{strategy}: step {step}: loss {losses[-1]['loss'].item():.3f}, MaxVio {max_violation:.2f}")
    model.eval()
    held_out = rows[:HELD_OUT].split(ROWS)
    with torch.no_grad(), balance.measuring() as load:
        losses = run(data_iterator=iter(held_out), num_microbatches=len(held_out), forward_only=True)
    loss = sum(one["loss"].item() for one in losses) / len(losses)
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    parser.add_argument("--strategy", help="compared with none (default: loss-free at a rate of 1 / steps)")
    parser.add_argument("--smoke", action="store_true", help="4 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps = 4 if options.smoke else options.steps
    strategies = ("none", options.strategy or f"loss-free:rate={1 / steps:g}")

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, value)  # without torchrun
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)

    torch.manual_seed(0)
    rows = read_rows(bytes_per_domain=10_000 if options.smoke else 300_000)
    table = {strategy: pretrain(strategy, rows, steps) for strategy in strategies}
    if parallel_state.get_data_parallel_rank() == 0:
        print(f"\n{'strategy':40} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
        for strategy, (max_violation, dead_experts, loss) in table.items():
            print(f"{strategy:40} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
