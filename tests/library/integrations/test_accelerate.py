"""The example of a loop over Accelerate runs, on one rank and on two, and is our own loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import equipoise

EXAMPLE = Path(__file__).parents[3] / "examples" / "accelerate_loop.py"


def _run(*command):
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return [float(line.split("MaxVio ")[1]) for line in done.stdout.splitlines() if "MaxVio" in line]


def _by_hand(ranks):
    """The loop of the example in one process, without Accelerate: micro-batches side by side go together."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, head_dim=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    micro_batches = torch.randint(64, (3 * 4 * ranks * 2, 16)).split(2)
    balance = equipoise.attach(model, "loss-free:rate=1e-2", "lbl:scope=sequence,coefficient=1e-4")
    found = []
    for start in range(0, len(micro_batches), 4 * ranks):
        for ids in micro_batches[start : start + 4 * ranks]:
            loss = model(input_ids=ids, labels=ids).loss + balance.loss()
            (loss / (4 * ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        found.append(balance.metrics()["maxvio_batch"])
    return found


def test_the_example_is_our_own_loop():
    assert _run(str(EXAMPLE)) == [round(value, 2) for value in _by_hand(1)]


_AND_ALL_IS_GIVEN_BACK = """
import runpy, torch

runpy.run_path({example!r}, run_name="__main__")
assert not torch.distributed.is_initialized(), "a rank that ends with its process groups may abort"
"""


@pytest.mark.slow
def test_the_example_on_two_ranks_is_one_process_with_the_tokens_of_both(tmp_path):
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    script = tmp_path / "and_all_is_given_back.py"
    script.write_text(_AND_ALL_IS_GIVEN_BACK.format(example=str(EXAMPLE)))
    assert _run(*launch, str(script)) == [round(value, 2) for value in _by_hand(2)]
