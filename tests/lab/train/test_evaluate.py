"""Evaluations: score sums, shares by domain, and the audit of what the experts do."""

import json

import numpy as np
import pytest
import reference
from tokenizers import Tokenizer

from equipoise_lab.records import Run
from equipoise_lab.train.config import ARCHITECTURES
from equipoise_lab.train.data import load_corpus
from equipoise_lab.train.loop import train
from equipoise_lab.train.selection import ExpertChoice


def _rows(folder, log="steps"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_evaluations_record_scores_and_shares_by_domain_and_layer(tiny, new_watcher, arch):
    config = tiny(arch=arch, layers=2, steps=2, evaluate_every=1, save_model=False)
    result = train(config, new_watcher())
    rows = _rows(config.out, "evaluations")
    assert len(rows) == 3  # on the selection text after steps 1 and 2, then on the test text
    for row in rows:
        sums = [value for domain in row["domains"].values() for value in domain["topk_score_sum"]]
        assert len(sums) == 3 * 2
        assert all(0.45 < value < 1 for value in sums), "k/E is 1/2; the bias may lower it a little"
        assert len(set(sums)) == 6, "domains or layers are mixed up"
        assert row["topk_score_sum"] == pytest.approx(sum(sums) / 6, rel=1e-12)
        shares = [
            max(
                max(c / sum(domain["load"][layer]) for c in domain["load"][layer]) for domain in row["domains"].values()
            )
            for layer in range(2)
        ]
        assert row["max_domain_share"] == pytest.approx(sum(shares) / 2, rel=1e-12)
        bits = [
            reference.domain_information([domain["load"][layer] for domain in row["domains"].values()])
            for layer in range(2)
        ]
        assert row["domain_information_bits"] == pytest.approx(sum(bits) / 2, abs=1e-12) != max(bits)
        assert row["maxvio_floor"] == pytest.approx(reference.sampling_floor(3 * 8 * 16, 2, 4), rel=1e-5)
    last = json.loads((config.out / "result.json").read_text())
    for name in ("topk_score_sum", "max_domain_share"):
        assert result[name] == last[name] == rows[-1][name]


def test_the_score_sum_and_the_loss_of_an_evaluation_are_means_over_its_tokens(tiny, new_watcher, tmp_path):
    """The same for any batches: eight sequences of a domain as four batches, as three of unequal size, as one."""
    figures = []
    for sequences in (2, 3, 8):
        options = {"strategy": "none", "steps": 1, "learning_rate": 1e-9, "save_model": False}  # weights hardly change
        config = tiny(out=tmp_path / str(sequences), sequences=sequences, **options)
        train(config, new_watcher())
        row = _rows(config.out, "evaluations")[-1]
        figures.append([row["topk_score_sum"], *(domain["nats"] for domain in row["domains"].values())])
    assert figures == [pytest.approx(figures[0], rel=1e-5)] * 3


def test_an_evaluation_does_not_disturb_training(tiny, new_watcher, tmp_path):
    for name, every in (("with", 2), ("without", 0)):
        train(tiny(out=tmp_path / name, steps=5, evaluate_every=every, save_model=False), new_watcher())
    assert _rows(tmp_path / "with") == _rows(tmp_path / "without")


# ---- audit.json ----


def _audit(config):
    return json.loads((config.out / "audit.json").read_text())


def _check_against_the_evaluation(config):
    """audit.json, which is counted at the taps, agrees with the counts of the last evaluation."""
    audit, row, run = _audit(config), _rows(config.out, "evaluations")[-1], Run(config.out)
    assert audit["domains"] == list(row["domains"]) == run.config["domains"]
    assert [layer["layer"] for layer in audit["layers"]] == run.config["layers"]
    assert audit["nats"] == {name: domain["nats"] for name, domain in row["domains"].items()}
    assert audit["tokens"] == {name: domain["tokens"] for name, domain in row["domains"].items()}
    for number, layer in enumerate(audit["layers"]):
        assert layer["load_by_domain"] == [domain["load"][number] for domain in row["domains"].values()]
        assert layer["topk_score_sum_by_domain"] == pytest.approx(
            [domain["topk_score_sum"][number] for domain in row["domains"].values()], rel=1e-6
        )
        chosen_with = np.array([sum(share for _, share in row) for row in layer["partners"]])
        assert chosen_with[np.array(layer["load"]) > 0] == pytest.approx(layer["k"] - 1, abs=0.01)
        split = [level["value"] for level in layer["information_by_level"].values()]
        assert sum(split) == pytest.approx(layer["domain_information_bits"]["value"])
    assert audit["mean"]["topk_score_sum"] == pytest.approx(row["topk_score_sum"], rel=1e-6)
    assert audit["mean"]["maxvio"] == pytest.approx(row["maxvio_global"])
    assert audit["complete"] is True
    return audit


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_run_writes_an_audit_of_its_experts_on_the_test_text(tiny, new_watcher, arch):
    config = tiny(arch=arch, layers=2, steps=2, save_model=False)
    train(config, new_watcher())
    audit = _check_against_the_evaluation(config)
    assert (audit["model"], audit["data"]) == (str(config.out), config.data)
    assert audit["model_type"] == arch and audit["num_parameters"] == Run(config.out).config["num_parameters"]
    assert audit["notes"][0] == "counted in the run's last evaluation, on 384 tokens of its test text"


def test_typical_tokens_come_from_the_evaluated_text(tiny, new_watcher):
    config = tiny(steps=2, evaluation_sequences=64, save_model=False)
    train(config, new_watcher())
    corpus = load_corpus(config.data, vocab_size=config.vocab_size, sequence_length=config.sequence_length)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    num = _audit(config)["tokens"]["fruit"]
    counts = {}
    for domain in corpus.domains:
        for token_id in corpus.tokens["test"][domain][:num].tolist():
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            counts[text] = counts.get(text, 0) + 1
    typical = [token for layer in _audit(config)["layers"] for expert in layer["typical_tokens"] for token in expert]
    assert len(typical) >= 8
    for token in typical:
        assert token["count"] == pytest.approx(token["share"] * counts[token["text"]])


def test_the_end_of_text_token_is_decoded(tiny, new_watcher):
    corpus = load_corpus(tiny().data, vocab_size=300, sequence_length=16)
    end = Tokenizer.from_file(str(corpus.tokenizer_file)).token_to_id("<|endoftext|>")
    assert corpus.decoder()(end) == "<|endoftext|>"


TOP_K = "experts are chosen by top-k of the scores, as in every evaluation; trained with --selection"


@pytest.mark.parametrize(
    ("selection", "note"),
    [
        ("expert-choice", f"{TOP_K} expert-choice"),
        ("sinkhorn", f"{TOP_K} sinkhorn"),
        ("hash", "experts are chosen by --selection hash, as in training"),
    ],
)
def test_the_audit_describes_the_choice_in_evaluation_under_another_selection(tiny, new_watcher, selection, note):
    config = tiny(steps=2, strategy="none", selection=selection, save_model=False)
    train(config, new_watcher())
    audit = _check_against_the_evaluation(config)
    assert audit["notes"][1] == note
    typical = [token["share"] for layer in audit["layers"] for expert in layer["typical_tokens"] for token in expert]
    assert (set(typical) == {1.0}) == (selection == "hash"), "a hash sends every occurrence of a token the same way"


def test_if_experts_choose_tokens_in_evaluation_nothing_is_written(tiny, new_watcher, monkeypatch):
    monkeypatch.setattr(ExpertChoice, "acts_in_evaluation", True)
    config = tiny(steps=2, strategy="none", selection="expert-choice", save_model=False)
    watcher = new_watcher()
    assert train(config, watcher)["val_nats"] > 0
    assert not (config.out / "audit.json").exists()
    assert "no audit.json: with --selection expert-choice experts choose tokens" in watcher.said


def test_a_resumed_run_writes_the_same_audit(tiny, new_watcher, tmp_path):
    whole, cut = tiny(out=tmp_path / "whole"), tiny(out=tmp_path / "cut")
    train(whole, new_watcher())
    with pytest.raises(KeyboardInterrupt):
        train(cut, new_watcher(7))
    assert not (cut.out / "audit.json").exists()
    (cut.out / "audit.json").write_text("{}")  # as if the run had been stopped between audit and result
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=cut.out, resume=True), new_watcher(9))
    assert not (cut.out / "audit.json").exists(), "it would describe other weights"
    train(tiny(out=cut.out, resume=True), new_watcher())
    assert _audit(cut) | {"model": ""} == _audit(whole) | {"model": ""}
