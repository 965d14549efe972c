"""`export-check`: whether a checkpoint still holds the trained biases, and what rounding them would do."""

import json

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from equipoise import EquipoiseError, UsageError, attach
from equipoise.routers.kind import MoELayer, RouterKind
from equipoise.routing import route
from equipoise.saved import BIASES_FILE
from equipoise_lab.cli import main
from equipoise_lab.models.export import _choose, check_export

SLOT = "e_score_correction_bias"


def _biases(model, size=0.1, around=0.0):
    balance = attach(model, "frozen")
    biases = {
        name: around + size * torch.randn(bias.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, bias) in enumerate(balance.biases.items())
    }
    balance.detach()
    return biases


def _save(folder, family="glm4_moe", *, around=0.0, size=0.1, **options):
    """Saves a checkpoint with known biases and returns them."""
    model = models.family(family, **options)
    biases = _biases(model, size, around)
    balance = attach(model, "frozen", biases=biases)
    model.save_pretrained(folder)
    balance.detach()
    return biases


def _rewrite(folder, change):
    """Replaces every tensor by ``change(name, tensor)``. None leaves it out."""
    file = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_bias_in_float32_is_kept(tmp_path, family):
    biases = _save(tmp_path, family)
    result = check_export(tmp_path)
    assert result.survived and result.family == family and len(result.layers) == 2
    for layer, (name, bias) in zip(result.layers, biases.items(), strict=True):
        assert (layer.layer, layer.verdict, layer.dtype) == (name, "kept", "float32")
        assert (layer.low, layer.high) == (bias.min().item(), bias.max().item())
        assert layer.num_experts == layer.distinct == 8
        assert 0 <= layer.rerouted_centred <= 1 and 0 <= layer.rerouted <= 1


def test_far_from_zero_bfloat16_leaves_few_values_and_reroutes_tokens(tmp_path):
    """Known defect 73. Between 4 and 8 bfloat16 has steps of 1/32."""
    (bias, *_) = _save(tmp_path, around=7.0, size=0.05).values()
    layer = check_export(tmp_path).layers[0]
    assert layer.verdict == "kept" and layer.distinct == 8
    steps = {round(float(value) * 32) for value in bias}
    assert layer.distinct_bfloat16 == len(steps) < 8
    weight = load_file(tmp_path / "model.safetensors")[f"{layer.layer}.weight"]
    hidden = torch.randn(4096, weight.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = [
        route(hidden @ weight.T, 2, score_function="sigmoid", bias=biases).expert_ids.sort().values
        for biases in (bias, torch.tensor([round(float(value) * 32) / 32 for value in bias]))
    ]
    assert layer.rerouted == pytest.approx(float((chosen[0] != chosen[1]).any(-1).double().mean()), abs=1e-9)
    assert layer.rerouted > 5 * layer.rerouted_centred
    assert any("loads the bias in bfloat16 sends" in note for note in check_export(tmp_path).notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_saved_in_16_bits_is_rounded(tmp_path, dtype):
    _save(tmp_path)
    _rewrite(tmp_path, lambda name, tensor: tensor.to(dtype) if name.endswith(SLOT) else tensor)
    result = check_export(tmp_path)
    assert not result.survived and {layer.verdict for layer in result.layers} == {"rounded"}
    assert result.layers[0].dtype == str(dtype).removeprefix("torch.")
    assert "2 of 2 layers hold the bias in 16 bits" in " ".join(result.notes)


def test_a_bias_left_out_of_the_checkpoint_is_lost(tmp_path):
    _save(tmp_path)
    _rewrite(tmp_path, lambda name, tensor: None if name.endswith(SLOT) and ".0." in name else tensor)
    result = check_export(tmp_path)
    assert not result.survived and [layer.verdict for layer in result.layers] == ["lost", "kept"]
    assert "1 of 2 layers have no bias here" in " ".join(result.notes)


def test_values_that_all_fit_bfloat16_are_noted_but_count_as_kept(tmp_path):
    _save(tmp_path)
    assert "every value fits bfloat16" not in " ".join(check_export(tmp_path).notes)
    _rewrite(tmp_path, lambda name, tensor: tensor.bfloat16().float() if name.endswith(SLOT) else tensor)
    result = check_export(tmp_path)
    assert result.survived and "2 of 2 layers are saved in 32 bits, but every value fits bfloat16" in result.notes[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_multiplicative_biases_are_checked_in_their_file_even_if_there_is_a_slot(tmp_path, family):
    model = models.family(family)
    zeros = attach(model, "loss-free:rule=multiplicative").detach()
    biases = {name: torch.linspace(-0.31, 0.29, len(zero)) for name, zero in zeros.items()}
    balance = attach(model, "loss-free:rule=multiplicative", biases=biases)
    model.save_pretrained(tmp_path)
    balance.save_biases(tmp_path)
    result = check_export(tmp_path)
    assert result.survived and [layer.verdict for layer in result.layers] == ["kept", "kept"]
    assert result.layers[0].low == pytest.approx(-0.31)
    assert 'attach(model, "frozen:multiplies=true"' in " ".join(result.notes)
    (tmp_path / BIASES_FILE).unlink()
    assert not check_export(tmp_path).survived


def test_the_choice_is_by_a_product_if_the_bias_multiplies_and_else_by_a_sum():
    bias = torch.tensor([0.501, 1.501])
    logits = torch.tensor([[0.4, 0.2]]).logit()
    layer = MoELayer("gate", None, RouterKind("sigmoid"), num_experts=2, k=1, slot=None)
    assert _choose(layer, logits, bias, multiplies=True).item() == 0, "1.501 * 0.4 > 2.501 * 0.2"
    assert _choose(layer, logits, bias, multiplies=False).item() == 1, "0.501 + 0.4 < 1.501 + 0.2"


def test_the_slot_is_checked_if_a_file_of_additive_biases_is_not_named(tmp_path):
    biases = _save(tmp_path)
    save_file(biases, tmp_path / BIASES_FILE)
    result = check_export(tmp_path)
    assert result.survived and {layer.verdict for layer in result.layers} == {"kept"}
    save_file(biases, tmp_path / BIASES_FILE, {"multiplies": "true"})
    assert not check_export(tmp_path).survived  # no slot holds multiplicative biases


@pytest.mark.parametrize(("value", "verdict", "survived"), [(float("nan"), "not finite", False), (0.0, "zero", True)])
def test_zeros_survive_and_nan_does_not(tmp_path, value, verdict, survived):
    _save(tmp_path)
    _rewrite(tmp_path, lambda name, tensor: torch.full_like(tensor, value) if name.endswith(SLOT) else tensor)
    result = check_export(tmp_path)
    assert {layer.verdict for layer in result.layers} == {verdict} and result.survived == survived


def test_tensor_names_may_begin_differently(tmp_path):
    _save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("model.", "wrapped.", 1): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert check_export(tmp_path).survived


def test_a_family_without_a_slot_needs_its_biases_beside_the_weights(tmp_path):
    model = models.family("qwen3_moe")
    biases = _biases(model)
    model.save_pretrained(tmp_path)
    result = check_export(tmp_path)
    assert result.layers == () and result.survived and "no bias steers the choice of experts" in result.notes[0]
    save_file(biases, tmp_path / BIASES_FILE)
    result = check_export(tmp_path)  # written by hand: attach would not read it
    assert not result.survived and [layer.verdict for layer in result.layers] == ["not named", "not named"]
    assert "config.json does not name it, so attach does not read it" in result.notes[0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"equipoise": {"biases": BIASES_FILE}}))
    result = check_export(tmp_path)
    assert result.survived and [layer.verdict for layer in result.layers] == ["kept", "kept"]
    assert "plain Transformers and inference engines route without these biases" in result.notes[-1]
    (tmp_path / BIASES_FILE).unlink()
    assert not check_export(tmp_path).survived
    assert "is missing. Copy it" in check_export(tmp_path).notes[0]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must be a folder with a config.json"):
        check_export(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "glm4_moe"}')
    with pytest.raises(UsageError, match="has none: there is no model.safetensors"):
        check_export(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="must hold safetensors: .* holds pytorch_model.bin"):
        check_export(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(EquipoiseError, match="model.safetensors is damaged"):
        check_export(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    _save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(UsageError, match="type that the installed Transformers knows"):
        check_export(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    _save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(EquipoiseError, match="lists 2 files, and model-1.safetensors is missing"):
        check_export(tmp_path)


def test_an_adapter_is_not_taken_for_a_model_without_biases(tmp_path):
    _save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="it holds an adapter"):
        check_export(tmp_path)


def test_biases_are_checked_by_transformers_class_whatever_code_and_quantisation_the_config_names(tmp_path):
    _save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    config |= {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = check_export(tmp_path)
    assert result.survived and len(result.layers) == 2 and "auto_map" in " ".join(result.notes)


def test_a_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(EquipoiseError, match="must hold a router"):
        check_export(tmp_path)


def test_the_command_shows_a_table_and_exits_with_1_if_a_bias_is_lost(tmp_path, capfd):
    _save(tmp_path / "good")
    main(["export-check", str(tmp_path / "good")])
    stdout = capfd.readouterr().out
    assert "model.layers.0.mlp.gate" in stdout and "kept" in stdout
    _save(tmp_path / "bad")
    _rewrite(tmp_path / "bad", lambda name, tensor: tensor.bfloat16() if name.endswith(SLOT) else tensor)
    with pytest.raises(SystemExit) as stop:
        main(["export-check", str(tmp_path / "bad"), "--json"])
    assert stop.value.code == 1
    printed = json.loads(capfd.readouterr().out)
    assert printed["survived"] is False and printed["layers"][0]["dtype"] == "bfloat16"
