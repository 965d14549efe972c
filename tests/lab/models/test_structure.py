"""Config files as they lie on the Hub: which class is built from them, and what the notes say that this leaves out."""

import json

import pytest
import shrunken
import torch
import transformers
from torch import nn

from equipoise import UsageError
from equipoise_lab.cli import main
from equipoise_lab.models.load import load_model
from equipoise_lab.models.structure import _mtp_notes, read_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")

AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_local_experts": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_VL = {
    "model_type": "qwen3_vl_moe",
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "vision_config": VISION,
}


def _load(folder, config, **files):
    """The model of a folder with this config, and with other JSON files beside it. The last note is taken off: it says
    that there are no weights."""
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    loaded = load_model(folder)
    assert loaded.notes[-1].startswith("only the structure was read"), "there are no weights in these tests"
    return loaded, loaded.notes[:-1]


def _small(model_type, **options):
    """A small config of a family as it is saved, without what our notes are about."""
    config = shrunken.build(model_type).config.to_dict()
    return {key: value for key, value in config.items() if "nextn" not in key and "mtp" not in key} | options


# ---- code that comes with the model ----


@pytest.mark.parametrize(
    ("model_type", "built"),
    [
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("glm4_moe", "Glm4MoeForCausalLM"),
        ("minimax_m2", "MiniMaxM2ForCausalLM"),
        ("longcat_flash", "LongcatFlashForCausalLM"),
        ("nemotron_h", "NemotronHForCausalLM"),
        ("afmoe", "AfmoeForCausalLM"),
    ],
)
def test_transformers_class_is_built_although_the_config_brings_code(tmp_path, model_type, built):
    loaded, notes = _load(tmp_path, _small(model_type, architectures=[built], auto_map=AUTO_MAP))
    assert type(loaded.model).__name__ == built and loaded.zero_experts
    assert notes[0] == (
        f"config.json brings code of its own (auto_map), which was not run: {built} of Transformers was built instead"
    )


def test_a_config_that_transformers_cannot_read_may_be_meant_for_its_own_code(tmp_path):
    with pytest.raises(UsageError, match=r"MixtralConfig fails with .* may be meant for the code that it brings"):
        _load(tmp_path, MIXTRAL | {"num_local_experts": "four", "auto_map": AUTO_MAP})


def test_no_question_is_asked_about_code_that_comes_with_the_model(tmp_path, monkeypatch):
    """On a terminal, AutoConfig would ask whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(UsageError, match="needs its own code, which is not run here"):
        _load(tmp_path, {"model_type": "own_moe", "architectures": ["OwnMoeForCausalLM"], "auto_map": AUTO_MAP})


# ---- which class ----


@pytest.mark.parametrize(
    ("architectures", "note"),
    [
        (["MixtralForCausalLM"], None),
        ("MixtralForCausalLM", None),
        (["OwnForCausalLM", "MixtralForCausalLM"], None),
        (None, None),
        (["OwnForCausalLM"], "names OwnForCausalLM in architectures, which the installed Transformers does not have"),
        (["pipeline", "AutoModel", "PreTrainedModel", 3], "names pipeline, AutoModel, PreTrainedModel in arch"),
        (["Qwen3MoeForCausalLM"], "names Qwen3MoeForCausalLM in architectures, which belongs to another model_type"),
    ],
)
def test_it_is_noted_if_another_class_is_built_than_the_config_names(tmp_path, architectures, note):
    loaded, notes = _load(tmp_path, MIXTRAL | {"architectures": architectures})
    assert type(loaded.model) is transformers.MixtralForCausalLM
    assert len(notes) == (note is not None)
    if note:
        assert note in notes[0] and "MixtralForCausalLM, the class of AutoModel for mixtral, was built" in notes[0]


@pytest.mark.parametrize("architecture", ["MixtralForSequenceClassification", "MixtralModel"])
def test_the_named_class_is_built_if_it_is_of_that_type(tmp_path, architecture):
    loaded, notes = _load(tmp_path, MIXTRAL | {"architectures": [architecture]})
    assert type(loaded.model).__name__ == architecture and notes == []


def test_a_class_of_the_text_part_is_built_from_the_text_config(tmp_path):
    text = TEXT | {"model_type": "qwen3_vl_moe_text", "num_experts": 6}
    loaded, notes = _load(tmp_path, QWEN_VL | {"architectures": ["Qwen3VLMoeTextModel"], "text_config": text})
    assert type(loaded.model).__name__ == "Qwen3VLMoeTextModel" and notes == []
    assert type(loaded.config).__name__ == "Qwen3VLMoeTextConfig" and loaded.config.num_experts == 6


@pytest.mark.parametrize(("model_type", "says"), [("kimi_k2", "model_type kimi_k2, which"), (None, "no model_type:")])
def test_an_unknown_type_is_read_by_its_known_architecture(tmp_path, model_type, says):
    """As in Kimi-K2, whose config is DeepSeek-V3's under another name."""
    config = _small("deepseek_v3", architectures=["DeepseekV3ForCausalLM"])
    loaded, notes = _load(tmp_path, config | {"model_type": model_type})
    assert type(loaded.model) is transformers.DeepseekV3ForCausalLM and loaded.config.n_routed_experts == 8
    assert f"config.json has {says}" in notes[0] and "by its architecture DeepseekV3ForCausalLM" in notes[0]


def test_weights_are_read_into_the_class_that_the_notes_name(tmp_path):
    model = shrunken.build("deepseek_v3")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": AUTO_MAP, "audio_config": {"hidden_size": 7}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path, require_all_weights=True)
    assert loaded.has_weights and len(loaded.notes) == 3
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(loaded.model.get_parameter(gate), model.get_parameter(gate))


@pytest.mark.parametrize("content", ["[1, 2]", "{'model_type': 'mixtral'}", '"mixtral"', "[" * 100_000, "{}", ""])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"MODEL must have a config.json of Transformers: \S+config.json "):
        load_model(tmp_path)


def test_the_config_of_a_part_is_refused(tmp_path):
    with pytest.raises(UsageError, match="step3p5 is the config of a part"):
        _load(tmp_path, {"model_type": "step3p5"})


# ---- values that do not arrive ----


def test_flat_keys_of_a_nested_config_are_noted(tmp_path):
    flat = {"num_experts": 6, "hidden_size": 32}
    loaded, notes = _load(tmp_path, QWEN_VL | {"text_config": {**TEXT} | {"num_experts": 8}})
    assert notes == []
    nested = {key: value for key, value in TEXT.items() if key not in flat}
    loaded, notes = _load(tmp_path, QWEN_VL | {"text_config": nested} | flat)
    assert loaded.config.text_config.num_experts == 60 and loaded.config.text_config.hidden_size == 2048
    assert notes[0] == (
        "config.json gives num_experts=6, hidden_size=32 at its top, where Qwen3VLMoeConfig does not look: the model "
        "was built with num_experts=60, hidden_size=2048, so it may be another"
    )
    assert "config.json has num_experts=6, but 60 experts were built from it" in notes[1]


def test_flat_keys_that_repeat_the_nested_ones_are_not_noted(tmp_path):
    _, notes = _load(tmp_path, QWEN_VL | {"text_config": TEXT, "num_experts": 8, "hidden_size": 32})
    assert notes == []


def test_a_nested_config_of_a_flat_family_is_noted(tmp_path):
    _, notes = _load(tmp_path, MIXTRAL | {"text_config": {"num_hidden_layers": 7}, "audio_config": {"d": 1}})
    assert notes == [
        "config.json has text_config, audio_config, which MixtralConfig does not read: what it describes was not built"
    ]


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"n_routed_experts": 6}, "config.json has n_routed_experts=6, but 8 experts were built from it"),
        ({"moe_topk": [3, 4]}, "config.json has moe_topk=3, moe_topk=4, but 2 experts a token were built from it"),
        ({"n_routed_experts": 6, "num_local_experts": 8}, None),
        ({"n_routed_experts": None, "moe_topk": [2, 4], "n_experts": {"a": "b"}}, None),
    ],
)
def test_experts_that_the_config_class_does_not_read_are_noted(tmp_path, given, note):
    without = {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"}  # its default is 8
    _, notes = _load(tmp_path, without | given)
    assert notes == ([] if note is None else [f"{note}: it is another model than the file means"])


# ---- quantised weights ----

FP8 = {"quant_method": "fp8", "fmt": "e4m3"}
NVFP4 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}


@pytest.mark.parametrize(
    ("config", "files", "method"),
    [
        ({"quantization_config": FP8}, {}, "fp8"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, {}, "modelopt NVFP4"),
        ({"quantization_config": "int8"}, {}, "some method"),
        ({"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, {},
         "compressed-tensors pack-quantized"),
        ({}, {"hf_quant_config": NVFP4}, "NVFP4, hf_quant_config.json"),
        ({}, {"quantize_config": {"bits": 4, "quant_method": "gptq"}}, "gptq, quantize_config.json"),
        ({}, {"quant_config": []}, "some method, quant_config.json"),
    ],
)  # fmt: skip
def test_the_structure_of_a_quantised_model_is_read_with_a_note(tmp_path, config, files, method):
    _load(tmp_path, MIXTRAL | config, **files)
    (tmp_path / "model.safetensors").write_bytes(b"weights that nobody reads")
    loaded = load_model(tmp_path)
    assert not loaded.has_weights and getattr(loaded.config, "quantization_config", None) is None
    assert loaded.notes == [
        f"only the structure was read, so there are no counts: its weights are quantised ({method}). Balancing is for "
        "training: use the model from before quantisation"
    ]
    with pytest.raises(UsageError, match="MODEL must have floating-point weights"):
        load_model(tmp_path, require_all_weights=True)


def test_quantisation_in_the_text_config_is_seen_and_dropped(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(QWEN_VL | {"text_config": TEXT | {"quantization_config": FP8}}),
    )
    loaded = load_model(tmp_path)
    assert "quantised (fp8)" in loaded.notes[-1]
    assert getattr(loaded.config.text_config, "quantization_config", None) is None


def test_a_quantised_cache_is_no_quantised_weight(tmp_path):
    cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    _load(tmp_path, MIXTRAL | {"quantization_config": None}, hf_quant_config=cache)
    assert "quantised" not in " ".join(load_model(tmp_path).notes)


# ---- layers and experts that are not there ----


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        ({"mtp_num_layers": 2}, "mtp_num_layers=2"),
        ({"use_mtp": True, "num_mtp_modules": 3, "mtp_transformer_layers": 1}, "num_mtp_modules=3"),
        ({"mtp_num_hidden_layers": 1}, "mtp_num_hidden_layers=1"),
        ({"n_mtp_layers": 1}, "n_mtp_layers=1"),
        ({"mtp_config": {"num_nextn_predict_layers": 4}}, "num_nextn_predict_layers=4"),
        ({"num_nextn_predict_layers": 0, "num_mtp_modules": None, "mtp_num_layers": True}, None),
        ({"mtp_loss_scaling_factor": 1, "mtp_eh_proj": 1}, None),
    ],
)
def test_layers_for_multi_token_prediction_are_noted(tmp_path, config, says):
    _, notes = _load(tmp_path, MIXTRAL | config)
    notes = [note for note in notes if "multi-token" in note]
    assert len(notes) == (says is not None)
    if says:
        assert notes[0].startswith(
            f"config.json has {says}: layers for multi-token prediction, which are not in Transf"
        )


def test_layers_for_multi_token_prediction_are_noted_if_only_the_weights_show_them(tmp_path):
    index = {"weight_map": {"model.embed.weight": "a.safetensors", "model.mtp.0.eh_proj.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _, notes = _load(tmp_path, MIXTRAL)
    assert len(notes) == 1 and notes[0].startswith("the weights hold model.mtp.0.eh_proj.weight: layers for multi-tok")


def test_layers_for_multi_token_prediction_that_the_model_has_are_not_noted():
    model = nn.ModuleDict({"mtp": nn.Linear(1, 1)})
    assert list(_mtp_notes(model, {"num_nextn_predict_layers": 1}, [])) == []
    assert len(list(_mtp_notes(nn.ModuleDict(), {"num_nextn_predict_layers": 1}, []))) == 1


def test_zero_experts_are_told_from_real_ones(tmp_path, capsys):
    loaded, notes = _load(tmp_path, _small("longcat_flash", n_routed_experts=8, zero_expert_num=4))
    assert set(loaded.zero_experts.values()) == {4}
    assert notes == [
        "4 of the 12 experts of a layer are zero or identity experts, which compute nothing. They are counted and "
        "balanced as the others are"
    ]
    main(["families", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "  12 (4 zero)  " in out.splitlines()[2] and f"note: {notes[0]}" in err.splitlines()
    main(["families", str(tmp_path), "--json"])
    examined = json.loads(capsys.readouterr().out)
    assert {(layer["num_experts"], layer["zero_experts"]) for layer in examined["layers"]} == {(12, 4)}
    assert notes[0] in examined["notes"]
    loaded, notes = _load(tmp_path, _small("longcat_flash", n_routed_experts=8, zero_expert_num=0))
    assert set(loaded.zero_experts.values()) == {0} and notes == []


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("glm4_moe", {"first_k_dense_replace": 1}),
        ("deepseek_v3", {"first_k_dense_replace": 1}),
        ("qwen2_moe", {"mlp_only_layers": [0]}),
        ("granitemoehybrid", {"num_local_experts": 0}),
        ("nemotron_h", {"layers_block_type": ["full_attention", "mlp"]}),
    ],
)
def test_a_dense_model_of_a_family_with_experts_is_called_dense(tmp_path, model_type, options):
    with pytest.raises(UsageError, match=r"MODEL must have experts: the \w+ForCausalLM of .*config.json is dense"):
        _load(tmp_path, _small(model_type, **options))


def test_a_model_with_experts_that_cannot_be_attached_is_not_called_dense(tmp_path):
    config = shrunken.shrink(transformers.AutoConfig.for_model("jetmoe"))
    with pytest.raises(UsageError, match=r"router \(JetMoeTopKGating\) cannot be: its forward does not return"):
        _load(tmp_path, config.to_dict())


def test_nothing_is_allocated_for_a_model_of_any_size(tmp_path):
    """The model of 47e9 parameters would take 187 GB."""
    loaded, _ = _load(tmp_path, {"model_type": "mixtral"})
    assert loaded.num_parameters == sum(p.numel() for p in loaded.model.parameters()) > 46e9
    assert all(tensor.device == torch.device("meta") for tensor in loaded.model.parameters())


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_of_attention_that_is_not_installed_hides_no_router(tmp_path, key):
    loaded, _ = _load(tmp_path, _small("qwen3_moe", **{key: "flash_attention_2"}))
    assert type(loaded.model).__name__ == "Qwen3MoeForCausalLM"


def test_a_config_file_that_is_too_large_is_named(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**24 + 1)  # sparse: it takes no place
    with pytest.raises(UsageError, match="cannot be read .it has more than 16,777,216 bytes"):
        read_config(tmp_path)
