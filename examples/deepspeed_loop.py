"""Pretrains a small Qwen3-MoE in an engine of DeepSpeed, without balancing and with it, on one process or several.

    python examples/deepspeed_loop.py                        # --stage 3: another stage of ZeRO
    torchrun --nproc-per-node 2 examples/deepspeed_loop.py

A loop over an engine needs equipoise.attach, follow_engine, and balance.loss() added to the loss. The text is the
corpus that is packaged with equipoise, as bytes. The processes share the micro-batches of a step. The table at the end
is about held-out text: without balancing a few experts take most of the tokens. Needs deepspeed. Takes about a minute
on one core of a CPU.
"""

import argparse
import json
import lzma
import os
import socket
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import equipoise
import equipoise_lab
from equipoise import metrics
from equipoise.integrations.deepspeed import follow_engine

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


def start_deepspeed() -> None:
    if "RANK" not in os.environ:  # not started by torchrun: one process, at a free port
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it as it is imported
    import deepspeed

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")


def pretrain(strategy: str, train_rows: Tensor, held_out: Tensor, stage: int) -> tuple[float, ...]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    import deepspeed

    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": max(1, MICRO_BATCHES // num_ranks),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW needs no compiler
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    model = make_model()
    balance = equipoise.attach(model, strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    follow_engine(balance, engine)

    for rows in train_rows.split(ROWS)[rank::num_ranks]:
        rows = rows.to(engine.device)
        loss = engine(input_ids=rows, labels=rows).loss + balance.loss()
        engine.backward(loss)  # divides by the number of micro-batches
        is_last = engine.is_gradient_accumulation_boundary()
        engine.step()  # acts only after the last micro-batch
        if is_last:
            max_violation = balance.metrics()["maxvio_batch"]
            if rank == 0:
                print(f"{strategy}: step {balance.num_windows}: MaxVio {max_violation:.2f}")

    own = held_out.to(engine.device).split(ROWS)[rank::num_ranks]
    with torch.no_grad(), balance.measuring() as load:  # over all processes
        loss = torch.stack([engine(input_ids=rows, labels=rows).loss for rows in own]).mean()
    torch.distributed.all_reduce(loss)
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss.item() / num_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run (default: 150)")
    parser.add_argument("--strategy", default="lbl:scope=global_batch,coefficient=1e-2", help="compared with none")
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO, 0 to 3 (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="3 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps, num_held_out = (3, 32) if options.smoke else (options.steps, 512)

    start_deepspeed()
    rows = read_rows(10_000 if options.smoke else 300_000)
    held_out, train_rows = rows[:num_held_out], rows[num_held_out:][: steps * MICRO_BATCHES * ROWS]
    table = {name: pretrain(name, train_rows, held_out, options.stage) for name in ("none", options.strategy)}
    if torch.distributed.get_rank() == 0:
        print(f"\n{'strategy':42} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
        for name, (max_violation, dead_experts, loss) in table.items():
            print(f"{name:42} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")
    torch.distributed.destroy_process_group()  # without it a rank may abort as it exits


if __name__ == "__main__":
    main()
