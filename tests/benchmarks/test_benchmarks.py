"""The benchmarks compute what they say; their results are stored runs and are not made here."""

import importlib.util
import mmap
import random
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise_lab.train.config import Train

ROOT = Path(__file__).parents[2]


def _load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_until_balance_by_hand():
    quantile = _load("quantile")
    values = [1.0, 0.3, 0.2, 0.2, 0.4, 0.1]  # medians of three: 0.3, 0.2, 0.2, 0.2
    assert quantile.steps_until(values, span=3) == 4
    assert quantile.steps_until(values, 0.05, span=3) is None
    assert quantile.share_after([0.2, 0.2, 0.4, 0.4], span=2) == pytest.approx(0.0)
    assert quantile.share_after(values, span=3) == 1.0
    assert quantile.share_after(values, 0.05, span=3) is None


@pytest.mark.parametrize("quantile_steps, sign_steps, holds", [(10, (30, 40, None), True), (11, (30, 40, None), False)])
def test_the_claim_is_against_the_best_rate(quantile_steps, sign_steps, holds):
    quantile = _load("quantile")
    found = dict(zip((quantile.QUANTILE, *quantile.SIGN), (quantile_steps, *sign_steps), strict=True))
    rows = [{"strategy": strategy, "steps_until_balance": steps} for strategy, steps in found.items()]
    claim = quantile.claim(rows, 50)
    assert claim["holds"] is holds and claim["best_sign"] == quantile.SIGN[0] and claim["factor_is"] == "exact"


def test_the_page_of_many_ranks_has_the_stored_figures():
    ranks = _load("ranks")
    stored = ranks.read_json(ranks.STORED)
    assert ranks.page(stored) == ranks.PAGE.read_text()
    changed = {**stored, "growth": [{**row, "step_milliseconds": 0} for row in stored["growth"]]}
    assert ranks.page(changed) != ranks.PAGE.read_text()
    assert {row["strategy"] for row in stored["step_time"]} == set(ranks.STRATEGIES)


def test_growth_is_of_what_it_says():
    ranks = _load("ranks")
    row = ranks.growth(2, 16, 2)
    assert row["collective_bytes"] == 8 * 2 * 16 and row["step_milliseconds"] > 0


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    for name, words in {"fruit": "apple pear plum fig", "metal": "iron zinc gold tin"}.items():
        draw = random.Random(name)
        documents = [" ".join(draw.choices(words.split(), k=60)) for _ in range(60)]
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


@pytest.mark.slow
def test_pooling_error_trains_as_the_lab_does_and_measures_beside_it(tiny, tmp_path):
    from equipoise_lab.records import Run
    from equipoise_lab.train.loop import train

    class Silent:
        say = begin = step = end = lambda *arguments: None

    pooling_error = _load("pooling_error")
    train(tiny, Silent())
    expected = [row["loss"] for row in Run(tiny.out).rows("steps")]
    with pooling_error.reproducible():
        training = pooling_error.Training(replace(tiny, out=tmp_path / "other"))
        losses = [training.step(), training.step()]
        found = training.measure()
        losses.append(training.step())
    assert losses == pytest.approx(expected, rel=1e-6)
    assert max(found["check"].values()) < pooling_error.LARGEST
    for mode in pooling_error.MODES:
        assert 0 < found["errors"][mode]["routers"]["error"] < 100
    # one micro-batch and the window are the same where the window has one: no way to know f is then wrong
    with pooling_error.reproducible():
        training = pooling_error.Training(replace(tiny, out=tmp_path / "third", micro_batches=1))
        training.step()
        found = training.measure()
    assert found["errors"]["window"]["routers"]["error"] < 1e-6
    assert found["errors"]["micro_batch"]["routers"]["error"] < 1e-6
    assert found["errors"]["previous"]["routers"]["error"] > 1e-3


def test_attach_of_many_layers_is_timed_family_by_family():
    attach = _load("attach")
    row = attach.measure("mixtral", layers=4, repeats=1)
    assert row["layers"] == 4 and 0 < row["later_cpu_seconds"] <= row["first_cpu_seconds"]
    stored = attach.json.loads(attach.STORED.read_text())
    assert [row["family"] for row in stored["rows"]] == list(attach.FAMILIES)
    assert all(row["layers"] == attach.LAYERS for row in stored["rows"])
    assert stored["holds"] == all(row["first_cpu_seconds"] <= attach.LIMIT for row in stored["rows"])


@pytest.mark.slow
def test_an_audit_is_quick_and_small_and_was_measured_so(tiny, tmp_path):
    from equipoise_lab.train.loop import train

    class Silent:
        say = begin = step = end = lambda *arguments: None

    audit = _load("audit")
    train(replace(tiny, save_model=True), Silent())
    pair = audit.Pair(tiny.out, tiny.data, tokens=1024, length=32)
    assert sum(ids.numel() for ids in pair.batches) == 1024
    found = pair.measure(pairs=2)
    assert found["tokens"] == 1024 and found["ratio"] > 0.5 and len(found["ratios"]) == 2
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: earlier tests may have had more
    before = audit.peak_mib()
    with mmap.mmap(-1, 2**26) as room:  # of the kernel: malloc may have as much left from earlier tests
        room.write(bytes(2**26))
        assert 60 < audit.peak_mib() - before < 140
    assert audit.peak(tiny.out, 1024, tiny.data, length=32)["tokens"] == 1024
    stored = audit.json.loads(audit.STORED.read_text())
    time, over, memory = stored["command_time"], stored["over_bare_forwards"], stored["peak_memory"]
    few, many = memory["few"], memory["many"]
    assert many["tokens"] > 7 * few["tokens"] and len(over["ratios"]) == over["pairs"]
    holds = [
        time["holds"] == (time["seconds"] <= audit.MOST_SECONDS),
        over["holds"] == (over["ratio"] <= audit.MOST_RATIO),
        memory["holds"] == (memory["growth"] <= audit.MOST_GROWTH),
        stored["holds"] == (time["holds"] and over["holds"] and memory["holds"]),
    ]
    assert all(holds), holds


def test_an_overhead_is_that_of_one_thing_over_another():
    overhead = _load("overhead")
    row = overhead.update(layers=3, experts=8, tokens=16, rounds=2)
    assert (row["layers"], row["experts"], row["tokens"]) == (3, 8, 16) and 0 < row["milliseconds"] < 1000
    for strategy in ("frozen", *overhead.BARS):
        plain = overhead.nn.ModuleList([overhead.Router(16, 8, 2), overhead.Router(16, 8, 2)]).train()
        row = overhead._routers(strategy, plain, overhead.torch.randn(64, 16), rounds=2)
        assert row["strategy"] == strategy and row["forward"]["rounds"] == 2 and row["forward"]["median"] > 0
        assert (row["limit"] is None) == (strategy not in overhead.COUNTING)


def test_what_is_between_is_done_after_every_call_and_not_timed(monkeypatch):
    calls, paired = [], _load("paired")
    took = paired.in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, 1, lambda: calls.append(0)
    )
    assert calls == ["a", 0, "b", 0, "b", 0, "a", 0, "a", 0, "b", 0]
    assert {name: len(seconds) for name, seconds in took.items()} == {"a": 2, "b": 2}
    clock = [0.0]
    monkeypatch.setattr(paired.time, "perf_counter", lambda: clock[0])
    between = lambda: clock.append(clock.pop() + 5)  # noqa: E731
    took = paired.in_turn({"a": lambda: clock.append(clock.pop() + 2)}, 2, 0, between)
    assert took == {"a": [2, 2]} and clock == [14]


def test_the_experts_that_are_compared_compute_the_same():
    experts = _load("experts")
    layers = experts.layers(32, 16, 8, 2, 24, experts.torch.float32)
    assert {"ours", "dense", *experts.WAYS} == set(layers)
    x = experts.torch.randn(1, 24, 32)
    parts = [(name, layers[name]) for name in ("ours", *experts.WAYS)]
    for name, stock in parts[1:]:  # their weights are (experts, out, in)
        stock.experts.gate_up_proj.data.copy_(layers["ours"].gate_up.transpose(1, 2))
        stock.experts.down_proj.data.copy_(layers["ours"].down.transpose(1, 2))
        output = stock(x)
        output = output[0] if isinstance(output, tuple) else output
        experts.torch.testing.assert_close(output, layers["ours"](x), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_the_lab_and_the_trainer_train_the_same(tiny, tmp_path, monkeypatch):
    trainer = _load("trainer")
    monkeypatch.setattr(
        trainer,
        "config",
        lambda steps, folder: replace(tiny, out=folder / "run", strategy="none", steps=steps, warmup=0.0),
    )
    found = {side: trainer.one(side, steps=3) for side in ("lab", "lab_with_grouped_mm", "trainer")}
    first, second, _ = found["lab"]["losses"]
    assert first > second
    for each in found.values():
        assert each["losses"][:2] == pytest.approx([first, second], rel=2e-3), (
            "its weights and its batches are the same"
        )
        assert each["seconds"] > 0
