"""docs/evidence/finetuning.md is what the stored result gives, and the runs behind it are tested on small sizes."""

import importlib
import random

import pytest

from equipoise_lab.records import read_json

finetune = importlib.import_module("finetune")


def test_the_page_is_what_the_stored_result_gives():
    stored = read_json(finetune.STORED)
    assert finetune.page(stored) == finetune.PAGE.read_text(encoding="utf-8")
    changed = {**stored, "rows": [{**row, "new_maxvio": row["new_maxvio"] + row["seed"]} for row in stored["rows"]]}
    assert finetune.page(changed) != finetune.PAGE.read_text(encoding="utf-8")


def test_the_stored_result_has_every_run_once():
    stored = read_json(finetune.STORED)
    assert [(row["arch"], row["new"], row["strategy"], row["seed"]) for row in stored["rows"]] == [
        (arch, new, strategy, seed)
        for seed in range(stored["seeds"])
        for arch, case in finetune.CASES.items()
        for new in stored["new_domains"]
        for strategy in (finetune.BEFORE, *case.strategies)
    ]
    assert stored["cases"] == {
        arch: {"pretraining": case.pretraining, "strategies": list(case.strategies)}
        for arch, case in finetune.CASES.items()
    }
    assert not set(stored["new_domains"]) & set(stored["old_domains"])


def test_the_rule_leaves_out_what_is_worse_on_old_text_then_reads_loss_then_maxvio():
    def arms(**by_strategy):
        """By strategy: loss on new text, loss on old text, MaxVio on new text, each the same offset for every seed."""
        return {
            measure: {
                strategy: {seed: value + seed + noise for seed, noise in enumerate((0.0, 0.01, -0.01, 0.0))}
                for strategy, value in zip(by_strategy, values, strict=True)
            }
            for measure, values in zip(
                ("new_nats", "old_nats", "new_maxvio"), zip(*by_strategy.values(), strict=True), strict=True
            )
        }

    strategies = ("a", "b", "c")
    reading = finetune.read(arms(a=(3.0, 3.0, 2.0), b=(2.9, 3.1, 0.5), c=(2.95, 2.9, 1.0)), strategies)
    assert reading == (["b"], "c", [], "c")
    reading = finetune.read(arms(a=(3.0, 3.0, 2.0), b=(2.9, 3.0, 1.5), c=(2.9, 2.9, 1.0)), strategies)
    assert reading == ([], "b", ["c"], "c")
    noisy = arms(a=(3.0, 3.0, 2.0), b=(2.9, 3.0, 1.5), c=(3.0, 2.9, 3.0))
    noisy["new_nats"]["a"] = {seed: value + (-1) ** seed for seed, value in noisy["new_nats"]["a"].items()}
    assert finetune.read(noisy, strategies) == ([], "b", ["a"], "b")


def test_better_in_all_needs_every_interval_below_zero():
    better, mixed = ({0: 1.0, 1: 2.0}, {0: 4.0, 1: 4.0})
    arms = {measure: {"a": {0: 2.0, 1: 3.0}, "b": better, "c": better} for measure in finetune.MEASURES}
    arms["old_maxvio"]["c"] = mixed
    assert finetune.better_in_all(arms, ("a", "b", "c")) == ["b"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    for name, words in {"fruit": "apple pear plum", "metal": "iron zinc gold", "tree": "oak ash elm"}.items():
        generator = random.Random(name)
        documents = [" ".join(generator.choices(words.split(), k=60)) for _ in range(60)]
        (source / f"{name}.txt").write_text("\n\n".join(documents))
    sizes = dict(layers=2, width=32, experts=4, experts_per_token=2, expert_width=16, sequence_length=16)
    return finetune.Experiment(
        folder=tmp_path / "runs",
        source=source,
        new_domains=("tree",),
        seeds=2,
        steps=3,
        tuning_steps=2,
        sequences=2,
        tuning_sequences=2,
        tuning_micro_batches=2,
        vocab_size=300,
        shared=sizes,
    )


@pytest.mark.slow
def test_a_tiny_experiment_measures_what_it_says_and_goes_on_where_it_stopped(tiny, monkeypatch):
    case = finetune.CASES["glm4_moe"]
    case = case._replace(strategies=("frozen", "quantile"), advised="frozen")
    monkeypatch.setattr(finetune, "CASES", {"glm4_moe": case})
    stored = finetune.run(tiny)
    assert stored["old_domains"] == ["fruit", "metal"] and len(stored["rows"]) == 2 * 3
    before, tuned, other, *_ = stored["rows"]
    assert before["strategy"] == finetune.BEFORE and before["new_nats"] != tuned["new_nats"]
    pretrained = read_json(tiny.folder / "pretrained" / f"{before['arch']}_seed0" / "result.json")
    assert (before["old_nats"], before["old_maxvio"]) == pytest.approx(
        (pretrained["val_nats"], pretrained["maxvio_global"])
    ), "the saved model computes and routes as the trained one"
    assert tuned["new_maxvio"] != other["new_maxvio"] or tuned["new_nats"] != other["new_nats"]
    assert tuned["new_tokens"] < tuned["old_tokens"] and not list((tiny.folder / "tuned").iterdir())
    assert "## Sigmoid router with a bias" in finetune.page(stored)
    monkeypatch.setattr(finetune, "train", lambda *arguments: pytest.fail("a finished run is trained again"))
    assert finetune.run(tiny)["rows"] == stored["rows"]
    next((tiny.folder / "results").glob("*quantile_seed1.json")).unlink()
    with pytest.raises(pytest.fail.Exception):
        finetune.run(tiny)
