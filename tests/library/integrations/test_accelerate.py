"""The example of a loop with Accelerate equals a loop without it, on one rank and on two."""

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
    """The MaxVio of every step that the example prints."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return [float(line.split("MaxVio ")[1]) for line in done.stdout.splitlines() if "MaxVio" in line]


def _by_hand(ranks):
    """MaxVio by step of the same loop without Accelerate: one process with the micro-batches of all ranks."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, head_dim=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    micro_batches = torch.randint(64, (3 * 4 * ranks * 2, 16)).split(2)
    balance = equipoise.attach(model, "loss-free:rate=1e-2", "lbl:scope=sequence,coefficient=1e-4")
    max_violations = []
    for start in range(0, len(micro_batches), 4 * ranks):
        for ids in micro_batches[start : start + 4 * ranks]:
            loss = model(input_ids=ids, labels=ids).loss + balance.loss()
            (loss / (4 * ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        max_violations.append(balance.metrics()["maxvio_batch"])
    return max_violations


def test_the_example_equals_a_loop_without_accelerate():
    assert _run(str(EXAMPLE)) == [round(value, 2) for value in _by_hand(1)]


_RUN_AND_CHECK_CLEANUP = """
import runpy, torch

runpy.run_path({example!r}, run_name="__main__")
assert not torch.distributed.is_initialized(), "a rank that ends without destroying its process groups may abort"
"""


@pytest.mark.slow
def test_the_example_on_two_ranks_equals_one_process_with_the_tokens_of_both(tmp_path):
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    script = tmp_path / "run_and_check_cleanup.py"
    script.write_text(_RUN_AND_CHECK_CLEANUP.format(example=str(EXAMPLE)))
    assert _run(*launch, str(script)) == [round(value, 2) for value in _by_hand(2)]
