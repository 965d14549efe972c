"""Biases saved beside the weights of a family without a slot, and read again when the model is loaded."""

import json
import logging

import pytest
import shrunken
import torch

import equipoise
from equipoise import EquipoiseError, UsageError
from equipoise.saved import BIASES_FILE, read_biases


def saved(folder, family="qwen3_moe", strategy="loss-free"):
    model = shrunken.build(family)
    names = list(equipoise.attach(model, "frozen").biases)
    model = shrunken.build(family)
    experts = model.config.num_experts if family == "qwen3_moe" else model.config.n_routed_experts
    biases = {name: torch.linspace(-0.1, 0.1, experts) + i for i, name in enumerate(names)}
    balance = equipoise.attach(model, strategy, biases=biases if strategy != "lbl" else None)
    model.save_pretrained(folder)
    return balance, biases, balance.save_biases(folder)


def load(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("strategy", ["frozen", "loss-free", "quantile"])
def test_attach_begins_with_the_biases_beside_the_weights(tmp_path, strategy):
    _, biases, path = saved(tmp_path)
    assert path == tmp_path / BIASES_FILE
    assert json.loads((tmp_path / "config.json").read_text())["equipoise"] == {"biases": BIASES_FILE}
    loaded = equipoise.attach(load(tmp_path), strategy).biases
    assert loaded.keys() == biases.keys() and all(torch.equal(loaded[name], biases[name]) for name in biases)
    zeros = {name: torch.zeros_like(value) for name, value in biases.items()}
    assert not any(v.any() for v in equipoise.attach(load(tmp_path), strategy, biases=zeros).biases.values())


def test_a_copy_of_a_model_that_was_trained_on_starts_with_its_newer_biases(tmp_path):
    from copy import deepcopy

    saved(tmp_path)
    model = load(tmp_path).train()
    balance = equipoise.attach(model, "loss-free:rate=0.1")
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    before = balance.biases
    for _ in range(2):
        model(input_ids=ids)
        balance.step()
    copied, now = equipoise.attach(deepcopy(model), "frozen").biases, balance.biases
    assert all(torch.equal(copied[name], now[name]) and not torch.equal(now[name], before[name]) for name in now)


def test_a_strategy_without_biases_warns_that_it_routes_otherwise(tmp_path, caplog):
    saved(tmp_path)
    with caplog.at_level(logging.WARNING, "equipoise"):
        equipoise.attach(load(tmp_path), "lbl")
    assert "was saved with biases, and lbl" in caplog.text and "Add frozen" in caplog.text


def test_biases_that_never_moved_are_no_reason_for_a_warning(tmp_path, caplog):
    model = shrunken.build("qwen3_moe")
    balance = equipoise.attach(model, "frozen")
    model.save_pretrained(tmp_path)
    assert balance.save_biases(tmp_path) is not None
    with caplog.at_level(logging.WARNING, "equipoise"):
        equipoise.attach(load(tmp_path), "lbl")
    assert "biases" not in caplog.text


def test_biases_that_are_promised_by_the_config_must_exist(tmp_path):
    saved(tmp_path)
    (tmp_path / BIASES_FILE).rename(tmp_path / "elsewhere.safetensors")
    model = load(tmp_path)
    with pytest.raises(
        EquipoiseError, match="which is not beside the weights .*Give biases=FOLDER, or begin from zero"
    ):
        equipoise.attach(model, "loss-free")
    biases = equipoise.attach(load(tmp_path), "loss-free", biases=tmp_path / "elsewhere.safetensors").biases
    assert all(value.any() for value in biases.values())
    del model.config.equipoise
    assert not any(value.any() for value in equipoise.attach(model, "loss-free").biases.values())


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    saved(tmp_path)
    (tmp_path / BIASES_FILE).write_bytes(b"x")
    with pytest.raises(EquipoiseError, match=f"{BIASES_FILE} must be a file that save_biases wrote"):
        equipoise.attach(load(tmp_path), "loss-free")


def test_a_model_with_slots_and_a_strategy_without_biases_write_no_file(tmp_path):
    assert saved(tmp_path / "a", "glm4_moe")[2] is None
    assert saved(tmp_path / "b", "qwen3_moe", "lbl")[2] is None
    assert not list(tmp_path.glob(f"*/{BIASES_FILE}"))


def test_the_folder_must_exist(tmp_path):
    balance, _, _ = saved(tmp_path)
    with pytest.raises(UsageError, match="must be one that the model was saved into"):
        balance.save_biases(tmp_path / "nowhere")


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_factors_are_loaded_as_factors_or_not_at_all(tmp_path, family):
    strategy = "loss-free:rate=0.1,rule=multiplicative"
    balance, biases, path = saved(tmp_path, family, strategy)  # a slot does not hold them, so both have a file
    assert path == tmp_path / BIASES_FILE and read_biases(tmp_path)[1]
    for refused in ("frozen", "loss-free"):
        for given in (None, tmp_path, balance.state_dict()):
            with pytest.raises(UsageError, match="these multiply the scores. Attach frozen:multiplies=true"):
                equipoise.attach(load(tmp_path), refused, biases=given)
    for taken in ("frozen:multiplies=true", strategy):
        loaded = equipoise.attach(load(tmp_path), taken).biases
        assert all(torch.equal(loaded[name], biases[name]) for name in biases)
    model, ids = load(tmp_path).eval(), torch.arange(12).view(1, 12)
    expected = logits_under(family, biases, strategy, model, ids)
    equipoise.attach(model, "frozen:multiplies=true")
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def logits_under(family, biases, strategy, model, ids):
    """The logits of the same model under the rule that made the factors."""
    other = shrunken.build(family).eval()
    other.load_state_dict(model.state_dict())
    equipoise.attach(other, strategy, biases=biases)
    return other(input_ids=ids).logits


def test_added_biases_are_refused_as_factors(tmp_path):
    balance, _, _ = saved(tmp_path)
    for given in (tmp_path, balance.state_dict()):
        with pytest.raises(UsageError, match="these are added to the scores"):
            equipoise.attach(load(tmp_path), "frozen:multiplies=true", biases=given)


def test_biases_that_were_saved_before_the_model_are_refused_or_not_used(tmp_path, caplog):
    balance, _, path = saved(tmp_path / "whole")
    (tmp_path / "early").mkdir()
    with pytest.raises(UsageError, match="must be one that the model was saved into"):
        balance.save_biases(tmp_path / "early")
    model = load(tmp_path / "whole")
    model.config.__dict__.pop("equipoise")
    model.save_pretrained(tmp_path / "early")
    path.rename(tmp_path / "early" / BIASES_FILE)
    with caplog.at_level(logging.WARNING, "equipoise"):
        begun = equipoise.attach(load(tmp_path / "early"), "frozen")
    assert "the model's config does not name it: it is not used" in caplog.text
    assert not any(value.any() for value in begun.biases.values())


def test_a_step_that_is_never_called_is_reported_once(caplog):
    model = shrunken.build("mixtral").train()
    balance = equipoise.attach(model, "loss-free")
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with caplog.at_level(logging.WARNING, "equipoise"), torch.no_grad(), balance.counting():
        for _ in range(255):
            model(input_ids=ids)
        assert "step()" not in caplog.text
        for _ in range(3):
            model(input_ids=ids)
        balance.step()
        for _ in range(257):
            model(input_ids=ids)
    assert caplog.text.count("256 micro-batches were counted since the last step()") == 1
