"""`export-check`: what a checkpoint has of the biases that training moved, and what rounding them would do."""

import json
from types import SimpleNamespace

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from equipoise import EquipoiseError, UsageError, attach
from equipoise.attachment import BIASES_FILE
from equipoise.routing import route
from equipoise_lab.cli import main
from equipoise_lab.models.export import _choice, check_export

SLOT = "e_score_correction_bias"


def _biases(model, size=0.1, around=0.0):
    balance = attach(model, "frozen")
    found = {
        name: around + size * torch.randn(bias.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, bias) in enumerate(balance.biases.items())
    }
    balance.detach()
    return found


def _saved(folder, family="glm4_moe", *, around=0.0, size=0.1, **options):
    """A checkpoint whose biases are known."""
    model = models.family(family, **options)
    biases = _biases(model, size, around)
    balance = attach(model, "frozen", biases=biases)
    model.save_pretrained(folder)
    balance.detach()
    return biases


def _rewrite(folder, change):
    """The same tensors after ``change(name, tensor)``, which leaves one out by None."""
    file = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_bias_in_float32_is_kept(tmp_path, family):
    biases = _saved(tmp_path, family)
    found = check_export(tmp_path)
    assert found.survived and found.family == family and len(found.layers) == 2
    for layer, (name, bias) in zip(found.layers, biases.items(), strict=True):
        assert (layer.layer, layer.verdict, layer.dtype) == (name, "kept", "float32")
        assert (layer.low, layer.high) == (bias.min().item(), bias.max().item())
        assert layer.num_experts == layer.distinct == 8
        assert 0 <= layer.rerouted_centred <= 1 and 0 <= layer.rerouted <= 1


def test_far_from_zero_bfloat16_leaves_few_values_and_tokens_go_elsewhere(tmp_path):
    """Known defect 73: between 4 and 8 bfloat16 has steps of 1/32."""
    (bias, *_) = _saved(tmp_path, around=7.0, size=0.05).values()
    layer = check_export(tmp_path).layers[0]
    assert layer.verdict == "kept" and layer.distinct == 8
    steps = {round(float(value) * 32) for value in bias}
    assert layer.distinct_bfloat16 == len(steps) < 8
    weight = load_file(tmp_path / "model.safetensors")[f"{layer.layer}.weight"]
    hidden = torch.randn(4096, weight.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = [
        route(hidden @ weight.T, 2, score_function="sigmoid", bias=bias).expert_ids.sort().values
        for bias in (bias, torch.tensor([round(float(value) * 32) / 32 for value in bias]))
    ]
    assert layer.rerouted == pytest.approx(float((chosen[0] != chosen[1]).any(-1).double().mean()), abs=1e-9)
    assert layer.rerouted > 5 * layer.rerouted_centred
    assert any("loads it in bfloat16 sends" in note for note in check_export(tmp_path).notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_that_was_saved_in_16_bits_is_rounded(tmp_path, dtype):
    _saved(tmp_path)
    _rewrite(tmp_path, lambda name, tensor: tensor.to(dtype) if name.endswith(SLOT) else tensor)
    found = check_export(tmp_path)
    assert not found.survived and {layer.verdict for layer in found.layers} == {"rounded"}
    assert found.layers[0].dtype == str(dtype).removeprefix("torch.")
    assert "2 of 2 layers hold it in 16 bits" in " ".join(found.notes)


def test_a_bias_that_was_left_out_is_lost(tmp_path):
    _saved(tmp_path)
    _rewrite(tmp_path, lambda name, tensor: None if name.endswith(SLOT) and ".0." in name else tensor)
    found = check_export(tmp_path)
    assert not found.survived and [layer.verdict for layer in found.layers] == ["lost", "kept"]
    assert "1 of 2 layers have no bias here" in " ".join(found.notes)


def test_values_that_all_fit_bfloat16_are_told_and_no_verdict(tmp_path):
    _saved(tmp_path)
    assert "nothing that bfloat16 could not hold" not in " ".join(check_export(tmp_path).notes)
    _rewrite(tmp_path, lambda name, tensor: tensor.bfloat16().float() if name.endswith(SLOT) else tensor)
    found = check_export(tmp_path)
    assert found.survived and "2 of 2 layers hold in 32 bits nothing that bfloat16 could not" in found.notes[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_factors_are_judged_by_their_file_whatever_the_slot(tmp_path, family):
    model = models.family(family)
    names = attach(model, "loss-free:rule=multiplicative").detach()
    factors = {name: torch.linspace(-0.31, 0.29, len(value)) for name, value in names.items()}
    balance = attach(model, "loss-free:rule=multiplicative", biases=factors)
    model.save_pretrained(tmp_path)
    balance.save_biases(tmp_path)
    found = check_export(tmp_path)
    assert found.survived and [layer.verdict for layer in found.layers] == ["kept", "kept"]
    assert found.layers[0].low == pytest.approx(-0.31) and 'attach(model, "frozen:multiplies=true"' in found.notes[-1]
    bias = torch.tensor([0.0, 1.0]) + 0.501  # 1.501 * 0.4 > 2.501 * 0.2, and 0.501 + 0.4 < 1.501 + 0.2
    logits = torch.tensor([[0.4, 0.2]]).logit()
    router = SimpleNamespace(kind=SimpleNamespace(score_function="sigmoid", selection="scores"), k=1, module=None)
    assert [_choice(router, logits, bias, multiplies).item() for multiplies in (True, False)] == [0, 1]
    (tmp_path / BIASES_FILE).unlink()
    assert not check_export(tmp_path).survived


def test_a_slot_counts_where_a_file_of_added_biases_lies_beside_that_nothing_names(tmp_path):
    biases = _saved(tmp_path)
    save_file(biases, tmp_path / BIASES_FILE)
    found = check_export(tmp_path)
    assert found.survived and {layer.verdict for layer in found.layers} == {"kept"}
    save_file(biases, tmp_path / BIASES_FILE, {"multiplies": "true"})
    assert not check_export(tmp_path).survived  # such ones are in no slot


@pytest.mark.parametrize(("value", "verdict", "survived"), [(float("nan"), "not finite", False), (0.0, "zero", True)])
def test_a_bias_that_is_nothing(tmp_path, value, verdict, survived):
    _saved(tmp_path)
    _rewrite(tmp_path, lambda name, tensor: torch.full_like(tensor, value) if name.endswith(SLOT) else tensor)
    found = check_export(tmp_path)
    assert {layer.verdict for layer in found.layers} == {verdict} and found.survived == survived


def test_another_beginning_of_the_names_is_no_loss(tmp_path):
    _saved(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.replace("model.", "wrapped.", 1): x for name, x in load_file(file).items()}, file, {"format": "pt"})
    assert check_export(tmp_path).survived


def test_a_family_without_a_slot_has_its_biases_beside_the_weights(tmp_path):
    model = models.family("qwen3_moe")
    biases = _biases(model)
    model.save_pretrained(tmp_path)
    found = check_export(tmp_path)
    assert found.layers == () and found.survived and "nothing steers its choice" in found.notes[0]
    save_file(biases, tmp_path / BIASES_FILE)
    found = check_export(tmp_path)  # written by hand: attach would not find it
    assert not found.survived and [layer.verdict for layer in found.layers] == ["not named", "not named"]
    assert "config.json does not name it: attach does not begin with it" in found.notes[0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"equipoise": {"biases": BIASES_FILE}}))
    found = check_export(tmp_path)
    assert found.survived and [layer.verdict for layer in found.layers] == ["kept", "kept"]
    assert "plain Transformers and engines route without these biases" in found.notes[-1]
    (tmp_path / BIASES_FILE).unlink()
    assert not check_export(tmp_path).survived
    assert "is not there: copy it" in check_export(tmp_path).notes[0]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must be a folder with a config.json"):
        check_export(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "glm4_moe"}')
    with pytest.raises(UsageError, match="must hold safetensors"):
        check_export(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(EquipoiseError, match="The file is damaged"):
        check_export(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    _saved(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing_of_the_sort"}')
    with pytest.raises(UsageError, match="must be a causal language model"):
        check_export(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path):
    _saved(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}})
    )
    with pytest.raises(EquipoiseError, match="1 of 2 are missing, as model-1.safetensors"):
        check_export(tmp_path)


def test_a_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(EquipoiseError, match="must hold a router"):
        check_export(tmp_path)


def test_the_command_says_it_and_ends_with_1_where_something_is_lost(tmp_path, capfd):
    _saved(tmp_path / "good")
    main(["export-check", str(tmp_path / "good")])
    shown = capfd.readouterr().err
    assert "model.layers.0.mlp.gate" in shown and "kept" in shown
    _saved(tmp_path / "bad")
    _rewrite(tmp_path / "bad", lambda name, tensor: tensor.bfloat16() if name.endswith(SLOT) else tensor)
    with pytest.raises(SystemExit) as stop:
        main(["export-check", str(tmp_path / "bad"), "--json"])
    assert stop.value.code == 1
    found = json.loads(capfd.readouterr().out)
    assert found["survived"] is False and found["layers"][0]["dtype"] == "bfloat16"
