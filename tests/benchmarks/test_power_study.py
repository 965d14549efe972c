"""The study of power: what its table makes of stored runs, and that a run is measured as it says."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def power(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_power", ROOT / "benchmarks" / "power.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "power")
    return module


def store(power, recipe, arm, seed, nats, seconds):
    way = {"val_nats": nats, "maxvio_global": 0.1, "domain_information_bits": 1.0, "core_seconds": 60.0}
    run = {"recipe": recipe, "arm": arm, "seed": seed, "core_seconds": seconds, "measured": {"0/60": way}}
    power.RESULTS.mkdir(exist_ok=True)
    power.job_file(recipe, arm, seed).write_text(json.dumps(run))


def test_efficiency_by_hand(power):
    """Differences of -0.1, -0.2 and -0.3: mean -0.2, sd 0.1, so 4; a pair costs 2 x 120 s, 1/15 of a core-hour: 60."""
    for seed, micro, other in ((200, 5.0, 4.9), (201, 5.5, 5.3), (202, 5.1, 4.8)):
        store(power, "a", "micro", seed, micro, 60.0)
        store(power, "a", "global", seed, other, 60.0)
        store(power, "b", "micro", seed, micro, 540.0)
        store(power, "b", "global", seed, other, 540.0)
    store(power, "a", "micro", 203, 9.0, 60.0)  # not paired yet
    first, second = power.rows()
    assert first["recipe"] == "a" and first["seeds"] == 3
    assert first["mean"] == pytest.approx(-0.2) and first["sd"] == pytest.approx(0.1)
    assert first["efficiency"] == pytest.approx(60.0) and second["efficiency"] == pytest.approx(12.0)
    assert first["loss"] == pytest.approx(statistics.fmean([4.9, 5.3, 4.8]))


def test_fewer_than_three_pairs_have_no_row(power):
    for seed in (200, 201):
        for arm in power.ARMS:
            store(power, "a", arm, seed, 5.0 + seed, 60.0)
    assert power.rows() == []


def test_a_run_is_measured_with_its_last_and_its_mean_weights(power, monkeypatch):
    """The mean of one step is that step; the mean of three is not."""
    tiny = {
        "steps": 6, "layers": 1, "width": 32, "experts": 4, "experts_per_token": 2, "expert_width": 8,
        "sequence_length": 16, "sequences": 1, "vocab_size": 300, "learning_rate": 0.02,
    }  # fmt: skip
    monkeypatch.setattr(power, "RECIPES", {"tiny": tiny})
    monkeypatch.setattr(power, "AVERAGED", (0.0, 0.5, 1 / 6))
    monkeypatch.setattr(power, "SEQUENCES", (2, 4))
    threads = torch.get_num_threads()
    power.measure("tiny", "global", 200)
    torch.set_num_threads(threads)
    stored = json.loads(power.job_file("tiny", "global", 200).read_text())
    ways = stored["measured"]
    assert set(ways) == {f"{share:g}/{text}" for share in power.AVERAGED for text in power.SEQUENCES}
    assert ways["0/4"]["val_nats"] != ways["0/2"]["val_nats"] and ways["0/4"]["val_nats"] != ways["0.5/4"]["val_nats"]
    one_step = ways[f"{1 / 6:g}/4"]["val_nats"]
    assert one_step == pytest.approx(ways["0/4"]["val_nats"], abs=1e-4)
    assert stored["core_seconds"] > 0 and stored["options"]["steps"] == 6 and "out" not in stored["options"]
