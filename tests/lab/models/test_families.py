"""``equipoise families`` from the command line: the list of families, one model of your own, and every refusal."""

import json
import re
import subprocess
import sys

import pytest
import shrunken
import torch
import transformers
from safetensors.torch import load_file, save_file

from equipoise import EquipoiseError
from equipoise_lab.cli import main
from equipoise_lab.models.examine import MAX_PARAMETERS
from equipoise_lab.models.families import Family
from equipoise_lab.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")


def _save_model(tmp_path, weights=False, **config):
    """A folder with a small model, or only its config, with some entries of the config replaced."""
    model = shrunken.build("glm4_moe")
    if weights:
        model.save_pretrained(tmp_path)
    else:
        model.config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tmp_path


def _examine(path, capsys):
    main(["families", str(path), "--json"])
    return json.loads(capsys.readouterr().out)


def _error_line(path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["families", str(path)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("equipoise: error: ")]
    return line


def test_a_model_without_weights_is_attached_but_no_batch_is_run(tmp_path, capsys):
    folder = _save_model(tmp_path)
    for path, reason in ((folder, "there is no model.safetensors"), (folder / "config.json", "only a config.json was")):
        examined = _examine(path, capsys)
        assert examined["model"] == "Glm4MoeForCausalLM" and examined["model_type"] == "glm4_moe"
        assert examined["weights"] == "none"
        (note,) = examined["notes"]
        assert note.startswith(f"only the structure was read, so there are no counts: {reason}")
        (layer,) = examined["layers"]
        assert layer["name"] == "model.layers.0.mlp.gate" and layer["score_function"] == "sigmoid"
        assert (layer["num_experts"], layer["zero_experts"], layer["k"], layer["selection"]) == (8, 0, 2, "scores")
        assert layer["slot"] == "e_score_correction_bias"
        assert layer["load"] is None and layer["maxvio"] is None


def test_a_model_without_weights_takes_no_memory(tmp_path):
    loaded = load_model(_save_model(tmp_path))
    assert loaded.num_parameters > 0 and {tensor.device.type for tensor in loaded.model.parameters()} == {"meta"}


def test_saved_weights_are_used_for_the_counts(tmp_path, capsys):
    folder = _save_model(tmp_path, weights=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.e_score_correction_bias.copy_(torch.arange(8) * 100.0)
    model.save_pretrained(folder)
    examined = _examine(folder, capsys)
    assert examined["weights"] == "loaded" and examined["notes"] == []
    assert examined["layers"][0]["load"] == [0] * 6 + [256, 256]
    assert examined["layers"][0]["maxvio"] == pytest.approx(3)


def test_the_table_of_a_model_goes_to_stdout_and_notes_to_stderr(tmp_path, capsys):
    main(["families", str(_save_model(tmp_path))])
    out, err = capsys.readouterr()
    first, titles, row = out.splitlines()
    assert first.startswith("Glm4MoeForCausalLM (glm4_moe), ") and first.endswith(" parameters, 1 MoE layers")
    assert titles.split()[:3] == ["layer", "experts", "k"] and titles.endswith("MaxVio")
    assert row.startswith("model.layers.0.mlp.gate") and "e_score_correction_bias" in row
    (note,) = err.splitlines()
    assert note.startswith("note: only the structure was read, so there are no counts: there is no model.safetensors")


def test_a_large_model_is_attached_without_a_batch(tmp_path, capsys):
    transformers.AutoConfig.for_model("deepseek_v3", num_hidden_layers=5).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    examined = _examine(tmp_path, capsys)
    assert examined["num_parameters"] > MAX_PARAMETERS and examined["weights"] == "none"
    assert re.search(r"no counts: the model has \d+.\de9 parameters", examined["notes"][-1])
    assert [layer["name"] for layer in examined["layers"]] == [f"model.layers.{i}.mlp.gate" for i in (3, 4)]
    assert all(layer["load"] is None and layer["maxvio"] is None for layer in examined["layers"])
    assert examined["layers"][0]["num_experts"] == 256 and examined["layers"][0]["k"] == 8


def test_hash_layers_are_noted(tmp_path, capsys):
    config = shrunken.build("deepseek_v4").config
    config.num_hidden_layers, config.layer_types = 2, config.layer_types * 2
    config.mlp_layer_types = ["hash_moe", "moe"]
    config.save_pretrained(tmp_path)
    examined = _examine(tmp_path, capsys)
    assert [layer["name"] for layer in examined["layers"]] == ["model.layers.1.mlp.gate"]
    assert "model.layers.0.mlp.gate is a hash layer: neither counted nor balanced" in examined["notes"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen99_moe"}, r"config.json says qwen99_moe. `equipoise families` lists"),
        (
            {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
            "has an auto_map, and the installed Transformers has no class for own",
        ),
        ({"model_type": None}, "has no model_type"),
        ({"hidden_size": -3}, "must have a config from which"),
    ],
)
def test_a_model_that_cannot_be_attached_is_refused_with_the_reason(tmp_path, capsys, config, message):
    line = _error_line(_save_model(tmp_path, **config), capsys)
    assert re.search(message, line), line


def test_a_model_without_a_supported_router_is_refused(tmp_path, capsys):
    transformers.AutoConfig.for_model(
        "llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=64, num_attention_heads=2
    ).save_pretrained(tmp_path)
    assert "the LlamaForCausalLM of " in (line := _error_line(tmp_path, capsys)) and "is dense" in line
    config = transformers.AutoConfig.for_model("phimoe")
    shrunken.shrink(config).save_pretrained(tmp_path)
    assert "(PhimoeTopKRouter) cannot be: it gives another result each time that it runs in training" in _error_line(
        tmp_path, capsys
    )


def test_files_that_hold_less_than_half_of_the_model_are_not_filled_up(tmp_path, capsys):
    folder = _save_model(tmp_path, weights=True)
    num_parameters = load_model(folder).num_parameters
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "model.safetensors", {"format": "pt"})
    examined = _examine(folder, capsys)
    reason = f"its files hold 32 numbers, and the model has {num_parameters:,} parameters"
    assert examined["weights"] == "none" and examined["notes"][-1].endswith(reason)
    with pytest.raises(EquipoiseError, match=f"MODEL must have all of its weights: .*{reason}"):
        load_model(folder, require_all_weights=True)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder).notes == ["no file holds model.norm.weight: random weights are used instead"]


def test_router_weights_saved_as_integers_are_refused(tmp_path, capsys):
    folder = _save_model(tmp_path, weights=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    line = _error_line(folder, capsys)
    assert "model.layers.0.mlp.gate.weight is saved as I8" in line


def test_the_integer_table_of_a_hash_router_is_not_taken_for_a_quantised_weight(tmp_path, capsys):
    model = shrunken.build(
        "deepseek_v4",
        num_hidden_layers=2,
        mlp_layer_types=["hash_moe", "moe"],
        layer_types=["compressed_sparse_attention"] * 2,
    )
    model.save_pretrained(tmp_path)
    examined = _examine(tmp_path, capsys)
    assert examined["weights"] == "loaded" and [layer["name"] for layer in examined["layers"]] == [
        "model.layers.1.mlp.gate"
    ]


def test_a_missing_or_damaged_config_is_refused(tmp_path, capsys):
    assert "hf download NAME --local-dir FOLDER" in _error_line(tmp_path / "none", capsys)
    assert "config.json does not exist" in _error_line(tmp_path, capsys)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in _error_line(tmp_path, capsys)


@pytest.mark.slow
def test_the_list_of_families_is_a_table_on_stdout():
    done = subprocess.run([sys.executable, "-m", "equipoise", "families", "--wide"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    titles, *rows = done.stdout.splitlines()
    assert titles.split()[:2] == ["model_type", "router"] and titles.endswith("why not")
    assert len(rows) >= 70
    (row,) = [row.split() for row in rows if row.startswith("glm4_moe ")]
    slot = ["e_score_correction_bias", "(router)"]
    assert row == ["glm4_moe", "Glm4MoeTopkRouter", "sigmoid", "scores", *slot, "yes", "no", "yes", "yes"]
    (row,) = [row for row in rows if row.startswith("phimoe ")]
    assert re.search(r" no +no +it gives another result each time that it runs in training$", row)
    (row,) = [row for row in rows if row.startswith("deepseek_v2 ")]
    assert re.search(r" - +yes +no +without groups +yes +$", row + " ")


def _family(name, **fields):
    row = dict.fromkeys(Family.__dataclass_fields__)
    row |= dict(model_type=name, router=f"{name.title()}Router", score_function="softmax", supported=True, tested=True)
    return Family(**row | fields)


@pytest.fixture
def listed(monkeypatch):
    families = [
        _family("qwen3_moe"),
        _family("qwen2_moe", group_limits=True),
        _family("zaya", supported=False, tested=False, reason="its weights are in proportion to none of softmax, " * 3),
    ]
    monkeypatch.setattr("equipoise_lab.cli.families._installed_families", lambda: families)


def test_the_list_has_three_columns_and_fits_80_characters(listed, capsys, monkeypatch):
    main(["families"])
    out, err = capsys.readouterr()
    titles, *rows = out.splitlines()
    assert titles.split() == ["model_type", "router", "supported"] and len(rows) == 3
    assert rows[0].split() == ["qwen3_moe", "Qwen3_MoeRouter", "yes"]
    assert rows[1].endswith(" without groups") and "no: its weights are in" in rows[2]
    assert "equipoise families --wide" in err
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "80")
    main(["families"])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 80


def test_families_are_filtered_by_a_part_of_their_name(listed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, expected in (("Qwen3", ["qwen3_moe"]), ("qwen", ["qwen3_moe", "qwen2_moe"]), ("zayarouter", ["zaya"])):
        main(["families", name, "--json"])
        assert [one["model_type"] for one in json.loads(capsys.readouterr().out)] == expected
    line = _error_line("qwen3moee", capsys)
    assert "qwen3moee does not exist, and no family" in line and line.endswith("Did you mean qwen3_moe or qwen2_moe?")
    assert "some/qwen does not exist. A model of the Hub" in _error_line("some/qwen", capsys)  # a path is a path
