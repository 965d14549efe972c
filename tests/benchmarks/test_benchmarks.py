"""Each benchmark measures what it says, on small sizes. Stored results are checked, never made here."""

import importlib.util
import json
import mmap
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equipoise_lab.train.config import Train

ROOT = Path(__file__).parents[2]


def _load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stored_result_of_ranks_has_every_strategy():
    costs = _load("rank_costs")
    assert {row["strategy"] for row in costs.read_json(costs.STORED)["step_time"]} == set(costs.STRATEGIES)


def test_growth_measures_the_shape_it_is_given():
    costs = _load("rank_costs")
    row = costs.growth(2, 16, 2)
    assert row["collective_bytes"] == 8 * 2 * 16 and row["step_milliseconds"] > 0


def test_the_table_of_samples_is_the_stored_one():
    sample = _load("sample")
    stored = json.loads(sample.STORED.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "evidence" / "experiments.md").read_text(encoding="utf-8")
    names = {
        **{(1 / part, None): f"1 token of {part}" for part in (4, 16, 64)},
        (1.0, None): "all tokens",
        **{(1.0, best): f"all tokens, the {best} best experts of each" for best in sample.BEST},
    }
    for (fraction, best), name in names.items():
        of_both = [
            next(row for row in stored["rows"] if (row["score_function"], row["fraction"], row["best"]) == key)
            for key in ((score_function, fraction, best) for score_function in sample.SCORE_FUNCTIONS)
        ]
        windows = ", ".join(f"{row['windows_until_even']:g}" for row in of_both).replace("40, 40", "never")
        digits = 1 if best else 2
        last = ", ".join(f"{row['last_violation']:.{digits}f}" for row in of_both)
        assert f"| {name} | {of_both[0]['additions_by_token']:g} | {windows} | {last} |" in text


def test_samples_are_measured_on_what_they_say(monkeypatch):
    sample = _load("sample")
    for name, value in {"EXPERTS": 8, "K": 2, "TOKENS": 256, "WINDOWS": 6, "LAST": 2, "SEEDS": 1}.items():
        monkeypatch.setattr(sample, name, value)
    all_tokens, best = sample.measure("sigmoid"), sample.measure("sigmoid", best=3)
    assert (all_tokens["additions_by_token"], best["additions_by_token"]) == (8, 3)
    first, *_, last = sample.violations("sigmoid", 1.0, 0, seed=0)
    assert first > 1 > last and all_tokens["last_violation"] < best["last_violation"]
    routing = sample.route(torch.randn(256, 8, generator=torch.Generator().manual_seed(0)), 2)
    histogram = sample.histogram_of_best(routing, torch.zeros(8), 3)
    assert histogram.sum(0).tolist() == [256] * 8 and int(histogram[:-1].sum()) == 3 * 256


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    for name, words in {"fruit": "apple pear plum fig", "metal": "iron zinc gold tin"}.items():
        generator = random.Random(name)
        documents = [" ".join(generator.choices(words.split(), k=60)) for _ in range(60)]
        (text / f"{name}.txt").write_text("\n\n".join(documents))
    return Train(
        out=tmp_path / "run",
        data=str(text),
        strategy="lbl:scope=global_batch",
        steps=3,
        vocab_size=300,
        layers=2,
        width=32,
        experts=4,
        experts_per_token=2,
        expert_width=16,
        sequence_length=16,
        sequences=2,
        micro_batches=2,
        evaluation_sequences=4,
        save_model=False,
    )


def test_attach_is_timed_for_each_family():
    attach = _load("attach")
    row = attach.measure("mixtral", layers=4, repeats=1)
    assert row["layers"] == 4 and 0 < row["later_cpu_seconds"] <= row["first_cpu_seconds"]
    stored = attach.json.loads(attach.STORED.read_text())
    assert [row["family"] for row in stored["rows"]] == list(attach.FAMILIES)
    assert all(row["layers"] == attach.LAYERS for row in stored["rows"])
    assert stored["holds"] == all(row["first_cpu_seconds"] <= attach.LIMIT for row in stored["rows"])


@pytest.mark.slow
def test_an_audit_is_timed_and_the_stored_result_judges_its_targets(tiny, tmp_path):
    from equipoise_lab.train.loop import train
    from equipoise_lab.train.run_folder import SilentWatcher

    audit = _load("audit")
    train(replace(tiny, save_model=True), SilentWatcher())
    pair = audit.Pair(tiny.out, tiny.data, tokens=1024, length=32)
    assert sum(ids.numel() for ids in pair.batches) == 1024
    result = pair.measure(pairs=2)
    assert result["tokens"] == 1024 and result["ratio"] > 0.5 and len(result["ratios"]) == 2
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak: earlier tests may have used more
    before = audit.peak_mib()
    with mmap.mmap(-1, 2**26) as room:  # from the kernel: malloc may have this much left over
        room.write(bytes(2**26))
        assert 60 < audit.peak_mib() - before < 140
    assert audit.peak(tiny.out, 1024, tiny.data, length=32)["tokens"] == 1024
    stored = audit.json.loads(audit.STORED.read_text())
    time, over, memory = stored["command_time"], stored["over_bare_forwards"], stored["peak_memory"]
    few, many = memory["few"], memory["many"]
    assert many["tokens"] > 7 * few["tokens"] and len(over["ratios"]) == over["pairs"]
    assert time["holds"] == (time["seconds"] <= audit.MOST_SECONDS)
    assert over["holds"] == (over["ratio"] <= audit.MOST_RATIO)
    assert memory["holds"] == (memory["growth"] <= audit.MOST_GROWTH)
    assert stored["holds"] == (time["holds"] and over["holds"] and memory["holds"])


def test_overhead_measures_updates_and_routers_of_every_strategy():
    overhead = _load("overhead")
    row = overhead.update(layers=3, experts=8, tokens=16, rounds=2)
    assert (row["layers"], row["experts"], row["tokens"]) == (3, 8, 16) and 0 < row["milliseconds"] < 1000
    for strategy in overhead.ROUTER_STRATEGIES:
        plain = overhead.nn.ModuleList([overhead.Router(16, 8, 2), overhead.Router(16, 8, 2)]).train()
        row = overhead._routers(strategy, plain, overhead.torch.randn(64, 16), rounds=2)
        assert row["strategy"] == strategy and row["forward"]["rounds"] == 2 and row["forward"]["median"] > 0
        assert (row["limit"] is None) == (strategy not in overhead.COUNTING_ONLY)


def test_the_call_between_follows_every_call_and_is_not_timed(monkeypatch):
    calls, paired = [], _load("paired")
    seconds = paired.in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, 1, lambda: calls.append(0)
    )
    assert calls == ["a", 0, "b", 0, "b", 0, "a", 0, "a", 0, "b", 0]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    clock = [0.0]
    monkeypatch.setattr(paired.time, "perf_counter", lambda: clock[0])
    between = lambda: clock.append(clock.pop() + 5)  # noqa: E731
    seconds = paired.in_turn({"a": lambda: clock.append(clock.pop() + 2)}, 2, 0, between)
    assert seconds == {"a": [2, 2]} and clock == [14]


def test_the_compared_experts_compute_the_same():
    experts = _load("experts")
    layers = experts.layers(32, 16, 8, 2, 24, experts.torch.float32)
    assert {"ours", "dense", *experts.WAYS} == set(layers)
    x = experts.torch.randn(1, 24, 32)
    for name in experts.WAYS:
        stock = layers[name]  # weights of shape (experts, out, in)
        stock.experts.gate_up_proj.data.copy_(layers["ours"].gate_up.transpose(1, 2))
        stock.experts.down_proj.data.copy_(layers["ours"].down.transpose(1, 2))
        output = stock(x)
        output = output[0] if isinstance(output, tuple) else output
        experts.torch.testing.assert_close(output, layers["ours"](x), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_the_lab_and_the_trainer_train_alike(tiny, tmp_path, monkeypatch):
    trainer = _load("trainer")
    monkeypatch.setattr(
        trainer,
        "config",
        lambda steps, folder: replace(tiny, out=folder / "run", strategy="none", steps=steps, warmup=0.0),
    )
    results = {side: trainer.measure(side, steps=3) for side in trainer.SIDES}
    first, second, _ = results["lab"]["losses"]
    assert first > second
    for result in results.values():
        assert result["losses"][:2] == pytest.approx([first, second], rel=2e-3), "same weights, same batches"
        assert result["seconds"] > 0
