"""`equipoise audit` on a model that the lab trained, and on what is no such model."""

import json

import pytest

from equipoise import EquipoiseError, UsageError
from equipoise.audit.command import COLUMNS, RESULT, audit, table_rows
from equipoise.audit.config import Audit
from equipoise.cli import main

SMALL = "--steps 2 --layers 2 --width 32 --experts 8 --experts-per-token 2 --expert-width 16 --sequence-length 32"


class Quiet:
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def done(self, tokens, of):
        pass


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for domain, words in (("law", "the court finds that the party of article"), ("verse", "o moon o night o silver")):
        (folder / f"{domain}.txt").write_text("\n\n".join(f"{words} {n} {n * 7 % 13}" * 4 for n in range(120)))
    return folder


@pytest.fixture(scope="module", params=["glm4_moe", "qwen3_moe"])
def run(request, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    strategy = "loss-free:rate=0.1,rule=sign"
    main(
        ["train", "--out", str(folder / "run"), "--data", str(text), "--arch", request.param, "--strategy", strategy]
        + SMALL.split()
    )
    return folder / "run"


def _audit(run, text, out, **more):
    quiet = Quiet()
    options = {"tokens": 2000, "sequence_length": 32, "out": out} | more
    return audit(Audit(run, str(text), **options), quiet), quiet


def test_a_run_of_the_lab_is_audited_with_its_own_tokenizer_and_offsets(run, text, tmp_path):
    found, quiet = _audit(run, text, tmp_path)
    assert json.loads((tmp_path / RESULT).read_text()) == found
    assert found["domains"] == ["law", "verse"] and set(found["nats"]) == {"law", "verse"}
    assert all(1 < value < 7 for value in found["nats"].values())
    with_offsets = any("equipoise_offsets" in note for note in found["notes"])
    assert with_offsets == (found["model_type"] == "qwen3_moe")
    texts = {token["text"] for layer in found["layers"] for expert in layer["typical_tokens"] for token in expert}
    assert any("court" in text or "moon" in text for text in texts)
    rows = table_rows(found)
    assert len(rows) == 2 and all(len(row) == len(COLUMNS) for row in rows)
    again, _ = _audit(run / "model", text, tmp_path / "again")
    assert again["layers"] == found["layers"], "the folder of the model is the same"


def test_the_command_prints_json_and_keeps_the_rest_off_stdout(run, text, tmp_path, capfd):
    main(
        ["audit", str(run), "--data", str(text), "--tokens", "500", "--sequence-length", "32", "--json"]
        + ["--out", str(tmp_path)]
    )
    out, err = capfd.readouterr()
    assert json.loads(out)["domains"] == ["law", "verse"] and "MaxVio" in err and RESULT in err


def test_what_cannot_be_audited_is_refused(run, text, tmp_path):
    with pytest.raises(UsageError, match="--tokens must be at least 1"):
        _audit(run, text, tmp_path, tokens=0)
    with pytest.raises(UsageError, match="is not there"):
        _audit(tmp_path / "nowhere", text, tmp_path)
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text((run / "model" / "config.json").read_text())
    with pytest.raises(UsageError, match="MODEL must have weights"):
        _audit(config, text, tmp_path)
    (config / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    with pytest.raises(EquipoiseError, match="must have its tokenizer beside it"):
        _audit(config, text, tmp_path)
    (config / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(EquipoiseError, match="must have all of its weights"):
        _audit(config, text, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out must be a folder"):
        _audit(run, text, tmp_path / "file")
