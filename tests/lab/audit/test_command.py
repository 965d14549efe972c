"""`equipoise audit` on a model that the lab trained, and on what it must refuse."""

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
from equipoise_lab.audit import command
from equipoise_lab.audit.command import COLUMNS, RESULT, audit, table_rows
from equipoise_lab.audit.config import Audit
from equipoise_lab.cli import main

SMALL = "--steps 2 --layers 2 --width 32 --experts 8 --experts-per-token 2 --expert-width 16 --sequence-length 32"


class RecordedProgress:
    def __init__(self):
        self.texts = []

    def say(self, text):
        self.texts.append(text)

    def done(self, tokens, total):
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


def _audit(run, text, out, **options):
    options = {"tokens": 2000, "sequence_length": 32, "out": out} | options
    return audit(Audit(run, str(text), **options), RecordedProgress())


def test_the_command_writes_a_report_and_prints_the_number_of_tokens(run, text, tmp_path, capsys):
    main(
        ["audit", str(run), "--data", str(text), "--tokens", "2000", "--sequence-length", "32", "--out", str(tmp_path)]
    )
    result, page = json.loads((tmp_path / RESULT).read_text()), (tmp_path / "report.html").read_text()
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("layer ") and len(stdout.splitlines()) == 1 + len(result["layers"])
    assert f"{sum(result['tokens'].values()):,} tokens; {tmp_path / RESULT}, {tmp_path / 'report.html'}" in stderr
    assert result["command"].startswith("equipoise audit") and "What the experts of this model do" in page
    assert result["text_key"] == "text" and f"<dd>{result['began'][:10]}, {result['began'][11:16]} UTC</dd>" in page
    levels = result["mean"]["information_by_level"]
    assert result["levels"] == {} and set(levels) == {"domain"}, "one script, no levels.json"


def test_a_folder_with_the_name_of_the_packaged_corpus_is_not_passed_over_silently(run, tmp_path, monkeypatch):
    def load(*args, **options):
        raise EquipoiseError("far enough")

    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    progress = RecordedProgress()
    with pytest.raises(EquipoiseError, match="far enough"):
        audit(Audit(run, "corpus", out=tmp_path / "audit"), progress)
    assert "the text is the packaged corpus; for the one in the current folder, write --data ./corpus" in progress.texts


def test_a_run_is_audited_with_its_own_tokenizer_and_biases(run, text, tmp_path):
    result = _audit(run, text, tmp_path)
    assert json.loads((tmp_path / RESULT).read_text()) == result
    assert result["domains"] == ["law", "verse"] and set(result["nats"]) == {"law", "verse"}
    assert all(1 < value < 7 for value in result["nats"].values())
    with_biases = any("equipoise_biases" in note for note in result["notes"])
    assert with_biases == (result["model_type"] == "qwen3_moe")
    texts = {token["text"] for layer in result["layers"] for expert in layer["typical_tokens"] for token in expert}
    assert any("court" in text or "moon" in text for text in texts)
    rows = table_rows(result)
    assert len(rows) == 2 and all(len(row) == len(COLUMNS) for row in rows)
    again = _audit(run / "model", text, tmp_path / "again")
    assert again["layers"] == result["layers"], "the folder of the model gives the same result"


def test_with_json_only_the_result_goes_to_stdout(run, text, tmp_path, capfd):
    main(
        ["audit", str(run), "--data", str(text), "--tokens", "500", "--sequence-length", "32", "--json"]
        + ["--out", str(tmp_path)]
    )
    out, err = capfd.readouterr()
    assert json.loads(out)["domains"] == ["law", "verse"] and "MaxVio" in err and RESULT in err


def test_invalid_options_and_models_are_refused(run, text, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--tokens must be at least 1"):
        _audit(run, text, tmp_path, tokens=0)
    with pytest.raises(UsageError, match="--sequence-length must be at least 2"):
        _audit(run, text, tmp_path, sequence_length=1)
    with pytest.raises(UsageError, match="does not exist"):
        _audit(tmp_path / "nowhere", text, tmp_path)
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text((run / "model" / "config.json").read_text())
    with monkeypatch.context() as patched:
        patched.setattr("equipoise_lab.models.load.build_structure", None)  # a model of 30e9 parameters fits nowhere
        with pytest.raises(UsageError, match="MODEL must have weights: .* has none: there is no model.safetensors"):
            _audit(config, text, tmp_path)
        (config / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
        with pytest.raises(UsageError, match=r"they are quantised \(NVFP4, hf_quant_config.json\)"):
            _audit(config, text, tmp_path)
        (config / "hf_quant_config.json").unlink()
    (config / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    with pytest.raises(EquipoiseError, match="must have its tokenizer beside it"):
        _audit(config, text, tmp_path)
    (config / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(EquipoiseError, match="must have all of its weights"):
        _audit(config, text, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out must be a folder"):
        _audit(run, text, tmp_path / "file")


# ---- errors on the command line: one line, no traceback ----

QWEN = pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)


@pytest.fixture
def saved(run, tmp_path):
    """A copy of a run's model, with its weights in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(run / "model").save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (run / "model" / name).exists():
            (folder / name).write_bytes((run / "model" / name).read_bytes())
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def _failed_command(capfd, model, data, out, *arguments):
    """The exit code and the error line of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(model), "--data", str(data), "--out", str(out), "--sequence-length", "32", *arguments])
    stdout, stderr = capfd.readouterr()
    errors = [line for line in stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in stderr and stdout == "", stderr
    assert stderr.splitlines()[-1] == errors[0]
    return stop.value.code, errors[0].removeprefix("equipoise: error: ")


def _remove_file(folder):
    next(folder.glob("model-00002-*")).unlink()
    return "model.safetensors.index.json lists {num} files, and model-00002-of-{num:05}.safetensors is missing"


def _truncate_file(folder):
    file = next(folder.glob("model-00002-*"))
    file.write_bytes(file.read_bytes()[:-50])
    return "model-00002-of-{num:05}.safetensors is damaged (SafetensorError: "


def _truncate_index(folder):
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
    return "no file holds model.layers.1.mlp.gate.weight"


@QWEN
@pytest.mark.parametrize("damage", [_remove_file, _truncate_file, _truncate_index, _drop_tensor])
def test_incomplete_weights_are_refused(run, saved, text, tmp_path, capfd, damage):
    num = len(list(saved.glob("model-*")))
    reason = damage(saved).format(num=num)
    code, error = _failed_command(capfd, saved, text, tmp_path / "out")
    assert code == 1 and error.startswith(f"MODEL must have all of its weights: {saved}: {reason}")
    assert error.endswith("Copy the folder again.") and not (tmp_path / "out").exists()


@QWEN
def test_an_index_beside_a_whole_file_is_not_read(run, saved, text, tmp_path):
    _remove_file(saved)
    (saved / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    result = _audit(saved, text, tmp_path / "out")
    assert result["complete"] is True


@QWEN
def test_a_model_without_experts_or_tokenizer_is_refused(run, saved, text, tmp_path, capfd):
    from transformers import AutoConfig, AutoModelForCausalLM

    dense = AutoConfig.for_model("llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path / "dense")
    code, error = _failed_command(capfd, tmp_path / "dense", text, tmp_path / "out")
    assert code == 2 and error.startswith("MODEL must have experts: the LlamaForCausalLM of ") and "is dense" in error
    (saved / "tokenizer.json").write_text("{")
    code, error = _failed_command(capfd, saved, text, tmp_path / "out")
    assert code == 1 and error.startswith(f"MODEL must have its tokenizer beside it: {saved}: ")
    (saved / "tokenizer.json").unlink()
    code, error = _failed_command(capfd, saved, text, tmp_path / "out")
    assert code == 1 and error.endswith(f"{saved}: there is none. Copy tokenizer.json there.")


def _no_file(folder, monkeypatch):
    return 2, "A folder of text must contain one text file or one sub-folder of text files per domain"


def _empty_file(folder, monkeypatch):
    (folder / "a.txt").touch()
    return 1, "A text file must contain text: "


def _damaged_archive(folder, monkeypatch):
    (folder / "a.txt.xz").write_text("no archive")
    return 1, f"{folder / 'a.txt.xz'} must be an xz file: "


def _dangling_link(folder, monkeypatch):
    (folder / "a.txt").symlink_to(folder / "nowhere")
    return 1, f"A domain must be a file or a folder: {folder / 'a.txt'} is neither. Remove it."


def _wrong_path(folder, monkeypatch):
    folder.rmdir()
    (folder.parent / "texts").mkdir()
    return 2, f"The text must be corpus, a folder, a file, or hf:NAME: {folder} does not exist here. Did you mean "


def _unreadable_file(folder, monkeypatch):
    path_open = Path.open

    def open_without_permission(path, *args, **options):  # chmod would not stop root
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return path_open(path, *args, **options)

    (folder / "a.txt").write_text("words")
    monkeypatch.setattr(Path, "open", open_without_permission)
    return 1, f"Text must be readable: {folder / 'a.txt'}: Permission denied. Check its permissions."


@QWEN
@pytest.mark.parametrize(
    "prepare", [_no_file, _empty_file, _damaged_archive, _dangling_link, _wrong_path, _unreadable_file]
)
def test_unreadable_text_is_refused_before_anything_is_counted(run, text, tmp_path, capfd, monkeypatch, prepare):
    folder = tmp_path / "text"
    folder.mkdir()
    code, message = prepare(folder, monkeypatch)
    if prepare not in (_no_file, _wrong_path):
        (folder / "0.txt").write_bytes((text / "law.txt").read_bytes())  # it is read first, without an error
    actual_code, error = _failed_command(capfd, run, folder, tmp_path / "out")
    assert actual_code == code and error.startswith(message) and not (tmp_path / "out").exists()


@QWEN
def test_domains_with_few_tokens_are_noted_and_marked(run, text, tmp_path, capfd):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "law.txt").write_bytes((text / "law.txt").read_bytes())
    (folder / "none.txt").write_text("a")
    main(["audit", str(run), "--data", str(folder), "--sequence-length", "32", "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / RESULT).read_text())
    assert result["left_out"] == ["none"]
    assert result["few_tokens"] == (["law"] if result["tokens"]["law"] < 2000 else [])
    assert "none fills no row of 32 tokens: it is left out" in capfd.readouterr().err
    main(
        ["audit", str(run), "--data", str(text), "--sequence-length", "32", "--tokens", "300"]
        + ["--out", str(tmp_path)]
    )
    assert json.loads((tmp_path / RESULT).read_text())["few_tokens"] == ["law", "verse"]
    assert "fewer than 2000 tokens of law, verse: the figures of such a domain are uncertain" in capfd.readouterr().err


# ---- interrupted audits ----


@QWEN
def test_the_counts_before_an_error_are_written(run, text, tmp_path, capfd):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "law.txt").write_bytes((text / "law.txt").read_bytes())
    (folder / "verse.txt").write_bytes("déjà vu".encode("latin-1"))
    code, error = _failed_command(capfd, run, folder, tmp_path / "out", "--tokens", "400")
    path = tmp_path / "out" / RESULT
    outcome = f"The counts so far are in {path}, marked as incomplete."
    assert (
        code == 1 and error.startswith("Text must be UTF-8: ") and error.endswith(f"for example with iconv. {outcome}")
    )
    result = json.loads(path.read_text())
    assert result["complete"] is False and result["tokens"] == {"law": 192} and result["left_out"] == ["verse"]
    assert any(note.startswith("incomplete: ended in verse after 192 of 384 tokens: ") for note in result["notes"])


@QWEN
def test_an_unexpected_exception_is_raised_unchanged_after_the_counts_are_written(run, text, tmp_path):
    class FailingProgress(RecordedProgress):
        def done(self, tokens, total):
            raise RuntimeError("a bug")

    progress = FailingProgress()
    with pytest.raises(RuntimeError, match="a bug"):
        audit(Audit(run, str(text), tokens=2000, sequence_length=32, out=tmp_path), progress)
    assert json.loads((tmp_path / RESULT).read_text())["complete"] is False
    assert progress.texts[-1].endswith("marked as incomplete.")


@pytest.mark.slow
@QWEN
def test_the_counts_before_ctrl_c_are_written(run, text, tmp_path):
    """In a process of its own. The text is long enough for the signal to arrive before its end."""
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
    environment, stderr = os.environ | {"OMP_NUM_THREADS": "1"}, ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as started:
        for line in started.stderr:
            stderr += line
            if "1 of 3 domains" in line:
                time.sleep(2)
                started.send_signal(signal.SIGINT)
    assert started.returncode == 130
    path = tmp_path / "out" / RESULT
    last_line = stderr.splitlines()[-1]
    assert last_line == f"equipoise: stopped. The counts so far are in {path}, marked as incomplete.", stderr
    result = json.loads(path.read_text())
    assert result["complete"] is False and any("it was stopped" in note for note in result["notes"])
    for layer in result["layers"]:
        assert sum(layer["load"]) == sum(result["tokens"].values()) * layer["k"]


@QWEN
def test_ctrl_c_before_the_first_batch_writes_nothing(run, text, tmp_path, capfd, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("equipoise_lab.audit.run.choose_vocabulary", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(run), "--data", str(text), "--out", str(tmp_path / "out")])
    assert stop.value.code == 130 and not (tmp_path / "out").exists()
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line == "equipoise: stopped. Nothing was counted yet, so nothing was written."


# ---- earlier results in the folder ----


@QWEN
def test_an_audit_replaces_only_an_earlier_audit_of_the_same_model_and_text(run, saved, text, tmp_path):
    first = _audit(run, text, tmp_path / "out", tokens=400)
    again = _audit(run, text, tmp_path / "out", tokens=800)
    assert sum(again["tokens"].values()) > sum(first["tokens"].values())
    with pytest.raises(UsageError, match=f"--out must be a folder of this audit: .* holds the audit of {run} on"):
        _audit(saved, text, tmp_path / "out")
    with pytest.raises(UsageError, match="--out must be a folder of this audit: .* holds the audit of"):
        _audit(run, "corpus", tmp_path / "out")
    assert json.loads((tmp_path / "out" / RESULT).read_text()) == again
    before = (run / RESULT).read_bytes()
    with pytest.raises(UsageError, match=f"--out must be a folder of this audit: {run} holds a run"):
        _audit(run, text, run)
    assert (run / RESULT).read_bytes() == before


@QWEN
def test_an_interrupted_audit_does_not_replace_a_complete_one(run, text, tmp_path, monkeypatch):
    complete = _audit(run, text, tmp_path)

    class InterruptingProgress(RecordedProgress):
        def done(self, tokens, total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="still holds the earlier, complete audit"):
        audit(Audit(run, str(text), tokens=2000, sequence_length=32, out=tmp_path), InterruptingProgress())
    assert json.loads((tmp_path / RESULT).read_text()) == complete


@QWEN
def test_an_unwritable_folder_is_an_error_before_the_work(run, text, capfd):
    code, error = _failed_command(capfd, run, text, Path("/proc/audit"))
    assert code == 1 and error.startswith("--out must be a folder that can be written: /proc/audit: ")


@QWEN
def test_levels_that_lack_a_domain_are_an_error_before_the_work(run, text, tmp_path, capfd):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    (folder / "levels.json").write_text('{"kind": {"law": "prose"}}')
    code, error = _failed_command(capfd, run, folder, tmp_path / "out")
    assert code == 2 and "with a label for every domain" in error and not (tmp_path / "out").exists()


@QWEN
def test_special_tokens_in_the_text_are_plain_text(run, text, tmp_path, monkeypatch):
    class Encoded(Exception):
        pass

    def encode_and_stop(model, encode, *args, end, **options):
        raise Encoded(encode("the <|endoftext|> court"), end)

    monkeypatch.setattr("equipoise_lab.audit.command.audit_model", encode_and_stop)
    with pytest.raises(Encoded) as encoded:
        _audit(run, text, tmp_path)
    ids, end = encoded.value.args
    assert end is not None and end not in ids and len(ids) > 5


@QWEN
def test_it_is_noted_if_a_run_was_trained_on_the_audited_text(run, text, tmp_path):
    def is_noted(folder):
        result = _audit(run, folder, tmp_path / "out", tokens=10_000)
        return any(
            "the run was trained on this text, except for the beginning of each domain" in note
            for note in result["notes"]
        )

    assert is_noted(text)  # both domains are read to their end
    other = tmp_path / "text"
    shutil.copytree(text, other)
    shutil.rmtree(tmp_path / "out")
    assert not is_noted(other)


# ---- runs ----


@QWEN
@pytest.mark.parametrize("records", ['{"format": 0, "strategy": "none"}', "{", None])
def test_only_the_model_of_a_run_is_read(run, text, tmp_path, records):
    """Any version of the lab may have written its records. They may be damaged or missing."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    for file in [*old.glob("*.jsonl"), old / "audit.json", old / "result.json"]:
        file.unlink()
    if records is None:
        (old / "config.json").unlink()
    else:
        (old / "config.json").write_text(records)
    result = _audit(old, text, tmp_path / "out")
    expected = _audit(run, text, tmp_path / "expected")
    assert result == expected | {"model": str(old), "began": result["began"]}


@QWEN
def test_a_run_without_a_saved_model_is_refused_with_a_hint(run, text, tmp_path, capfd):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((run / "config.json").read_bytes())
    code, error = _failed_command(capfd, bare, text, tmp_path / "out")
    assert code == 2 and error.endswith(
        f"{bare} is a run without a model. It was trained with --no-save-model, or has not finished."
    )
    (bare / "audit.json").write_bytes((run / "audit.json").read_bytes())
    _, error = _failed_command(capfd, bare, text, tmp_path / "out")
    assert error.endswith(f"What its experts did on its test text is in {bare / 'audit.json'}.")
