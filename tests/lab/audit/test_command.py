"""`equipoise audit` on a model that the lab trained, and on what is no such model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equipoise import EquipoiseError, UsageError
from equipoise_lab.audit.command import COLUMNS, RESULT, audit, table_rows
from equipoise_lab.audit.config import Audit
from equipoise_lab.cli import main

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


def test_the_command_leaves_a_page_and_says_how_much_was_read(run, text, tmp_path, capsys):
    main(
        ["audit", str(run), "--data", str(text), "--tokens", "2000", "--sequence-length", "32", "--out", str(tmp_path)]
    )
    found, page = json.loads((tmp_path / RESULT).read_text()), (tmp_path / "report.html").read_text()
    said = capsys.readouterr().err
    assert f"{sum(found['tokens'].values()):,} tokens; {tmp_path / RESULT}, {tmp_path / 'report.html'}" in said
    assert found["command"].startswith("equipoise audit") and "What the experts of this model do" in page
    assert found["levels"] == {} and set(found["mean"]["information_by_level"]) == {
        "domain"
    }  # one script, no levels.json


def test_a_run_of_the_lab_is_audited_with_its_own_tokenizer_and_biases(run, text, tmp_path):
    found, quiet = _audit(run, text, tmp_path)
    assert json.loads((tmp_path / RESULT).read_text()) == found
    assert found["domains"] == ["law", "verse"] and set(found["nats"]) == {"law", "verse"}
    assert all(1 < value < 7 for value in found["nats"].values())
    with_biases = any("equipoise_biases" in note for note in found["notes"])
    assert with_biases == (found["model_type"] == "qwen3_moe")
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
    with pytest.raises(UsageError, match="--sequence-length must be at least 2"):
        _audit(run, text, tmp_path, sequence_length=1)
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


# ---- what cannot be audited, from the command line: one line, no traceback ----

QWEN = pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)


@pytest.fixture
def saved(run, tmp_path):
    """A copy of the model of a run, its weights in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(run / "model").save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (run / "model" / name).exists():
            (folder / name).write_bytes((run / "model" / name).read_bytes())
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def _fails(capfd, model, data, out, *more):
    """The code and the only line of error of the command."""
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(model), "--data", str(data), "--out", str(out), "--sequence-length", "32", *more])
    printed, said = capfd.readouterr()
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in said and printed == "", said
    assert said.splitlines()[-1] == errors[0]
    return stop.value.code, errors[0].removeprefix("equipoise: error: ")


def _remove(folder):
    next(folder.glob("model-00002-*")).unlink()
    return (
        "of the {num} files that model.safetensors.index.json names, model-00002-of-{num:05}.safetensors is not there"
    )


def _truncate(folder):
    file = next(folder.glob("model-00002-*"))
    file.write_bytes(file.read_bytes()[:-50])
    return "model-00002-of-{num:05}.safetensors is damaged (SafetensorError: "


def _cut_index(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text()[:60])
    return "model.safetensors.index.json is damaged (JSONDecodeError: "


def _drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = {name: value for file in folder.glob("model-*") for name, value in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.layers.1.mlp.gate.weight is in none of its files"


@QWEN
@pytest.mark.parametrize("damage", [_remove, _truncate, _cut_index, _drop_tensor])
def test_weights_that_are_not_whole_are_refused(run, saved, text, tmp_path, capfd, damage):
    num = len(list(saved.glob("model-*")))
    code, said = _fails(capfd, saved, text, tmp_path / "out") if (what := damage(saved)) else (0, "")
    assert code == 1 and said.startswith(f"MODEL must have all of its weights: {saved}: {what.format(num=num)}")
    assert said.endswith("Copy the folder again.") and not (tmp_path / "out").exists()


@QWEN
def test_an_index_beside_a_whole_file_is_not_looked_at(run, saved, text, tmp_path):
    _remove(saved)
    (saved / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    found, _ = _audit(saved, text, tmp_path / "out")
    assert found["complete"] is True


@QWEN
def test_a_model_without_experts_or_tokenizer_is_refused(run, saved, text, tmp_path, capfd):
    from transformers import AutoConfig, AutoModelForCausalLM

    dense = AutoConfig.for_model("llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path / "dense")
    code, said = _fails(capfd, tmp_path / "dense", text, tmp_path / "out")
    assert code == 2 and said.startswith(
        "the model must hold a router that equipoise knows: LlamaForCausalLM holds none"
    )
    (saved / "tokenizer.json").write_text("{")
    code, said = _fails(capfd, saved, text, tmp_path / "out")
    assert code == 1 and said.startswith(f"MODEL must have its tokenizer beside it: {saved}: ")
    (saved / "tokenizer.json").unlink()
    code, said = _fails(capfd, saved, text, tmp_path / "out")
    assert code == 1 and said.endswith(f"{saved}: there is none. Copy tokenizer.json there.")


def _none(folder, monkeypatch):
    return 2, "A folder of text must hold one file or one sub-folder a domain"


def _empty(folder, monkeypatch):
    (folder / "a.txt").touch()
    return 1, "A file of text must hold text: "


def _foreign(folder, monkeypatch):
    (folder / "a.pdf").write_text("%PDF")
    return 2, "Text must come as .txt, .jsonl, .parquet"


def _dangling(folder, monkeypatch):
    (folder / "a.txt").symlink_to(folder / "nowhere")
    return 2, "Text must come as .txt, .jsonl, .parquet"


def _forbidden(folder, monkeypatch):
    from pathlib import Path

    plain = Path.open

    def opened(path, *args, **options):  # as without permission: root, who may run this, has it always
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return plain(path, *args, **options)

    (folder / "a.txt").write_text("words")
    monkeypatch.setattr(Path, "open", opened)
    return 1, f"Text must be readable: {folder / 'a.txt'}: Permission denied. Check its permissions."


@QWEN
@pytest.mark.parametrize("trouble", [_none, _empty, _foreign, _dangling, _forbidden])
def test_text_that_cannot_be_read_is_refused_before_anything_is_counted(
    run, text, tmp_path, capfd, monkeypatch, trouble
):
    folder = tmp_path / "text"
    folder.mkdir()
    code, said = trouble(folder, monkeypatch)
    if trouble is not _none:
        (folder / "0.txt").write_bytes((text / "law.txt").read_bytes())  # comes first, and is good
    got, line = _fails(capfd, run, folder, tmp_path / "out")
    assert got == code and line.startswith(said) and not (tmp_path / "out").exists()


@QWEN
def test_domains_of_few_tokens_are_said_and_marked(run, text, tmp_path, capfd):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "law.txt").write_bytes((text / "law.txt").read_bytes())
    (folder / "none.txt").write_text("a")
    main(["audit", str(run), "--data", str(folder), "--sequence-length", "32", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / RESULT).read_text())
    assert found["left_out"] == ["none"] and found["few_tokens"] == (["law"] if found["tokens"]["law"] < 2000 else [])
    assert "none fills no row of 32 tokens: it is left out" in capfd.readouterr().err
    main(
        ["audit", str(run), "--data", str(text), "--sequence-length", "32", "--tokens", "300"]
        + ["--out", str(tmp_path)]
    )
    assert json.loads((tmp_path / RESULT).read_text())["few_tokens"] == ["law", "verse"]
    assert "fewer than 2000 tokens of law, verse: what is said of such a domain is uncertain" in capfd.readouterr().err


# ---- an audit that is cut short ----


@QWEN
def test_an_error_in_the_midst_of_the_text_keeps_what_was_counted(run, text, tmp_path, capfd):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "law.txt").write_bytes((text / "law.txt").read_bytes())
    (folder / "verse.txt").write_bytes("déjà vu".encode("latin-1"))
    code, said = _fails(capfd, run, folder, tmp_path / "out", "--tokens", "400")
    path = tmp_path / "out" / RESULT
    kept = f"What was counted until then is in {path}, marked as not complete."
    assert code == 1 and said.startswith("Text must be UTF-8: ") and said.endswith(f"as with iconv. {kept}")
    found = json.loads(path.read_text())
    assert found["complete"] is False and found["tokens"] == {"law": 192} and found["left_out"] == ["verse"]
    assert any(
        note.startswith("not complete: ended within verse, after 192 of 384 tokens: ") for note in found["notes"]
    )


@QWEN
def test_a_bug_in_the_midst_of_the_text_is_raised_as_it_is(run, text, tmp_path):
    class Fails(Quiet):
        def done(self, tokens, of):
            raise RuntimeError("a bug")

    fails = Fails()
    with pytest.raises(RuntimeError, match="a bug"):
        audit(Audit(run, str(text), tokens=2000, sequence_length=32, out=tmp_path), fails)
    assert json.loads((tmp_path / RESULT).read_text())["complete"] is False
    assert fails.said[-1].endswith("marked as not complete.")


@pytest.mark.slow
@QWEN
def test_ctrl_c_keeps_what_was_counted(run, text, tmp_path):
    """A process of its own; the text is long enough for the signal to come in the midst of it."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "law.txt").write_text((text / "law.txt").read_text() * 60)
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"the court finds {n} of {n * 7} " * 20}) for n in range(4000))
        )
    command = [
        sys.executable,
        "-m",
        "equipoise",
        "audit",
        str(run),
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--sequence-length", "32", "--batch", "1", "--tokens", "1000000"]
    environment, said = os.environ | {"OMP_NUM_THREADS": "1"}, ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as started:
        for line in started.stderr:
            said += line
            if "1 of 3 domains" in line:
                time.sleep(2)
                started.send_signal(signal.SIGINT)
    assert started.returncode == 130
    path = tmp_path / "out" / RESULT
    last = said.splitlines()[-1]
    assert last == f"equipoise: stopped. What was counted until then is in {path}, marked as not complete.", said
    found = json.loads(path.read_text())
    assert found["complete"] is False and any("it was stopped" in note for note in found["notes"])
    for layer in found["layers"]:
        assert sum(layer["load"]) == sum(found["tokens"].values()) * layer["k"]


@QWEN
def test_ctrl_c_before_the_first_batch_writes_nothing(run, text, tmp_path, capfd, monkeypatch):
    def stops(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("equipoise_lab.audit.run.choose_vocabulary", stops)
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(run), "--data", str(text), "--out", str(tmp_path / "out")])
    assert stop.value.code == 130 and not (tmp_path / "out").exists()
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "equipoise: stopped. Nothing was counted yet, and nothing is written."


# ---- what is there already ----


@QWEN
def test_an_audit_replaces_itself_and_no_other(run, saved, text, tmp_path):
    first, _ = _audit(run, text, tmp_path / "out", tokens=400)
    again, _ = _audit(run, text, tmp_path / "out", tokens=800)
    assert sum(again["tokens"].values()) > sum(first["tokens"].values())
    with pytest.raises(UsageError, match=f"--out must be a folder of this audit: .* has the audit of {run} on"):
        _audit(saved, text, tmp_path / "out")
    with pytest.raises(UsageError, match="--out must be a folder of this audit: .* has the audit of"):
        _audit(run, "corpus", tmp_path / "out")
    assert json.loads((tmp_path / "out" / RESULT).read_text()) == again
    before = (run / RESULT).read_bytes()
    with pytest.raises(UsageError, match=f"--out must be a folder of this audit: {run} has a run"):
        _audit(run, text, run)
    assert (run / RESULT).read_bytes() == before


@QWEN
def test_an_audit_that_is_cut_short_does_not_replace_a_whole_one(run, text, tmp_path, monkeypatch):
    whole, _ = _audit(run, text, tmp_path)

    class Stops(Quiet):
        def done(self, tokens, of):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="is still the whole audit that was there before"):
        audit(Audit(run, str(text), tokens=2000, sequence_length=32, out=tmp_path), Stops())
    assert json.loads((tmp_path / RESULT).read_text()) == whole


@QWEN
def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(run, text, capfd):
    code, said = _fails(capfd, run, text, Path("/proc/audit"))
    assert code == 1 and said.startswith("files must be there to read and write: ") and "--resume" not in said


@QWEN
def test_levels_that_lack_a_domain_are_an_error_before_the_work(run, text, tmp_path, capfd):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    (folder / "levels.json").write_text('{"kind": {"law": "prose"}}')
    code, said = _fails(capfd, run, folder, tmp_path / "out")
    assert code == 2 and "with a label for every domain" in said and not (tmp_path / "out").exists()


@QWEN
def test_special_tokens_in_the_text_are_plain_text(run, text, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def encoded(model, encode, *args, end, **options):
        raise Seen(encode("the <|endoftext|> court"), end)

    monkeypatch.setattr("equipoise_lab.audit.command.audit_model", encoded)
    with pytest.raises(Seen) as seen:
        _audit(run, text, tmp_path)
    ids, end = seen.value.args
    assert end is not None and end not in ids and len(ids) > 5


@QWEN
def test_of_a_runs_own_text_it_is_said_what_it_was_trained_on(run, text, tmp_path):
    def says(folder):
        found, _ = _audit(run, folder, tmp_path / "out", tokens=10_000)
        return any("the run was trained on this text but for what comes first" in note for note in found["notes"])

    assert says(text)  # both domains are read to their end
    other = tmp_path / "text"
    shutil.copytree(text, other)
    shutil.rmtree(tmp_path / "out")
    assert not says(other)


# ---- runs ----


@QWEN
@pytest.mark.parametrize("records", ['{"format": 0, "strategy": "none"}', "{", None])
def test_of_a_run_the_model_is_read_and_not_the_records(run, text, tmp_path, records):
    """Whatever version wrote them."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    for file in [*old.glob("*.jsonl"), old / "audit.json", old / "result.json"]:
        file.unlink()
    if records is None:
        (old / "config.json").unlink()
    else:
        (old / "config.json").write_text(records)
    found, _ = _audit(old, text, tmp_path / "out")
    expected, _ = _audit(run, text, tmp_path / "expected")
    assert found == expected | {"model": str(old)}


@QWEN
def test_a_run_without_its_model_is_refused_and_told_apart(run, text, tmp_path, capfd):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((run / "config.json").read_bytes())
    code, said = _fails(capfd, bare, text, tmp_path / "out")
    assert code == 2 and said.endswith(
        f"{bare} is a run without the folder model. It was trained with --no-save-model, or is not finished."
    )
    (bare / "audit.json").write_bytes((run / "audit.json").read_bytes())
    _, said = _fails(capfd, bare, text, tmp_path / "out")
    assert said.endswith(f"What its experts did on its test text is in {bare / 'audit.json'}.")
