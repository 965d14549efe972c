"""Pretrains NeMo Automodel's DeepSeek-V3, in small, in a loop of one's own, without balancing and with it.

    pip install nemo-automodel
    python examples/automodel_loop.py
    python examples/automodel_loop.py --strategy loss-free:rate=1e-2+lbl:scope=sequence,coefficient=1e-4

The text is the corpus that is packaged with equipoise. A step has the order of Automodel's recipe. Its own update of
the bias is called too, and moves nothing while the model is attached. The table at the end is about held-out text.
Takes about a minute on one core of a CPU.
"""

import argparse
import json
import logging
import lzma
from pathlib import Path

import torch
import torch.nn.functional as F
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3ForCausalLM
from torch import Tensor
from transformers import DeepseekV3Config

import equipoise
import equipoise_lab
from equipoise import metrics

CORPUS = Path(equipoise_lab.__file__).parent / "corpus"
LENGTH, EXPERTS, ROWS, MICRO_BATCHES, HELD_OUT = 64, 16, 8, 2, 128


def make_model() -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=LENGTH,
        dtype=torch.float32,
    )
    backend = BackendConfig(linear="torch", rms_norm="torch", experts="torch", enable_hf_state_dict_adapter=False)
    model = DeepseekV3ForCausalLM(config, backend=backend)
    model.initialize_weights(torch.device("cpu"), torch.float32)
    return model.train()


def read_rows(bytes_per_domain: int) -> Tensor:
    """Rows of bytes from all eight domains of the corpus, in random order."""
    text = bytearray()
    for file in sorted(CORPUS.glob("*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            domain = "\n".join(json.loads(line)["text"] for line in lines)
        text += domain.encode()[:bytes_per_domain]
    rows = torch.frombuffer(text, dtype=torch.uint8).long()
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows))]


def summed_loss(model: DeepseekV3ForCausalLM, rows: Tensor) -> Tensor:
    logits = model(rows).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


def pretrain(strategy: str, rows: Tensor, steps: int) -> tuple[float, float, float]:
    """MaxVio, dead experts and loss of the held-out rows after training from scratch."""
    torch.manual_seed(1)  # the same weights and the same order of text for every strategy
    model = make_model()
    if strategy == "none":
        for layer in model.model.layers.values():
            layer.mlp.gate.bias_update_factor = 0.0  # else Automodel would balance by itself
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balance = equipoise.attach(model, strategy)
    balance.follow(optimizer)
    num_labels, num_tokens = MICRO_BATCHES * ROWS * (LENGTH - 1), MICRO_BATCHES * ROWS * LENGTH
    for step in range(1, steps + 1):
        for micro_batch in rows[torch.randint(HELD_OUT, len(rows), (MICRO_BATCHES, ROWS))]:
            loss = summed_loss(model, micro_batch) / num_labels
            (loss + balance.num_tokens / num_tokens * balance.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_moe_gate_bias()
        if step % max(1, steps // 4) == 0:
            print(f"{strategy}: step {step}: MaxVio {balance.metrics()['maxvio_batch']:.2f}")
    with torch.no_grad(), balance.measuring() as load:
        loss = summed_loss(model, rows[:HELD_OUT]) / (HELD_OUT * (LENGTH - 1))
    return metrics.max_violation(load).item(), metrics.dead_experts(load).item(), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run (default: 100)")
    parser.add_argument("--strategy", default="loss-free:rate=0.01", help="compared with none (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="3 steps on little text, in a few seconds: does it run?")
    options = parser.parse_args()
    steps = 3 if options.smoke else options.steps

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    rows = read_rows(bytes_per_domain=10_000 if options.smoke else 300_000)
    table = {strategy: pretrain(strategy, rows, steps) for strategy in ("none", options.strategy)}
    print(f"\n{'strategy':45} {'MaxVio':>7} {'dead experts':>13} {'loss, nats':>11}")
    for strategy, (max_violation, dead_experts, loss) in table.items():
        print(f"{strategy:45} {max_violation:7.2f} {dead_experts:13.0f} {loss:11.3f}")


if __name__ == "__main__":
    main()
