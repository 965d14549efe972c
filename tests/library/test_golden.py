"""A stored run of 20 steps. A change in what is counted, in when, or in how a bias moves shows here.

A change that is not meant to alter results must not change the stored run. A change that is meant to stores it again,
and shows the difference in its commit:

    PYTHONPATH=tests/helpers python tests/library/test_golden.py
"""

import json
from pathlib import Path

import grid
import pytest
import torch
from models import tiny_lm

import equipoise

FILE = Path(__file__).parents[1] / "golden" / "tiny.json"


def run():
    model = tiny_lm().double()
    balance = equipoise.attach(model, grid.STRATEGY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(20):
        losses, value = [], 0.0
        for number in range(3):
            ids = torch.randint(0, grid.VOCAB // (number + 1), (4, 9), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, : 3 * number] = 0
            loss, ticket = model(ids, mask), balance.loss()
            value += float(ticket.detach())
            losses.append(loss + ticket)
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        steps.append(
            {
                "loss": float(torch.stack(losses).mean().detach()),
                "balancing_loss": value / 3,
                "load": [load.tolist() for load in balance.load.values()],
                "biases": [bias.tolist() for bias in balance.biases.values()],
            }
        )
    return steps


def test_twenty_steps_are_as_stored():
    stored = json.loads(FILE.read_text())
    for number, (step, expected) in enumerate(zip(run(), stored, strict=True), 1):
        assert step["load"] == expected["load"], f"step {number}"
        # the scores are float32 in a float64 model, and round in each of 20 steps
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5), f"step {number}"
        assert step["balancing_loss"] == pytest.approx(expected["balancing_loss"], rel=1e-5), f"step {number}"
        for bias, stored_bias in zip(step["biases"], expected["biases"], strict=True):
            assert bias == pytest.approx(stored_bias, abs=1e-6), f"step {number}"


if __name__ == "__main__":
    FILE.write_text(json.dumps(run(), indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")
