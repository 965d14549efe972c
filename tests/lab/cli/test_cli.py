"""The command line: what goes to which stream, exit codes, errors in one line, what each command imports."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from equipoise_lab.cli import main

SMALL = [
    "--vocab-size=300", "--steps=2", "--layers=1", "--width=32", "--experts=4", "--experts-per-token=2",
    "--expert-width=16", "--sequence-length=16", "--sequences=2", "--micro-batches=2", "--evaluation-sequences=4",
]  # fmt: skip


def test_with_json_stdout_holds_nothing_but_the_result(text, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--data", str(text), "--out", str(out), "--workers", "1", "--strategies", "none", "loss-free", *SMALL]
    main(["compare", "--json", *options])
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout) == json.loads((out / "results.json").read_text())
    assert "step 2/2" in stderr
    assert "domain" in stderr  # the table
    (out / "report.html").unlink()
    main(["report", str(out)])
    assert (out / "report.html").exists()


def test_without_json_the_table_is_on_stdout(text, tmp_path, capsys):
    out = tmp_path / "out"
    main(["compare", "--data", str(text), "--out", str(out), "--workers", "1", "--strategies", "none", *SMALL])
    stdout, stderr = capsys.readouterr()
    titles, row = stdout.splitlines()
    assert titles.split()[:3] == ["Strategy", "Loss,", "nats"] and row.startswith("none ")
    assert titles.split()[-3:] == ["Dead", "experts", "Tokens/s"] and row.split()[-2].isdigit()
    assert str(out / "report.html") in stderr


def test_train_prints_its_folder_and_writes_its_page(text, tmp_path, capsys):
    main(["train", "--data", str(text), "--out", str(tmp_path / "run"), "--strategy", "lbl", *SMALL])
    stdout, stderr = capsys.readouterr()
    assert stdout.strip() == str(tmp_path / "run")
    assert "Loss, nats" in stderr and str(tmp_path / "run" / "report.html") in stderr
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_is_a_model_to_go_on_from(text, tmp_path, capsys, error_of, command):
    run = tmp_path / "run"
    main(["train", "--data", str(text), "--out", str(run), "--strategy", "none", *SMALL])
    options = ["--data", str(text), "--model", str(run), *SMALL]
    main([command, "--out", str(tmp_path / "more"), *options, *([] if command == "train" else ["--workers", "1"])])
    (path, *_) = (tmp_path / "more").rglob("steps.jsonl")
    options_of_run = json.loads((path.parent / "config.json").read_text())["options"]
    assert options_of_run["model"] == str(run / "model")
    first, again = (json.loads(file.read_text().splitlines()[0])["loss"] for file in (run / "steps.jsonl", path))
    assert again < first
    shutil.rmtree(run / "model")
    capsys.readouterr()
    assert "is a run without a model" in error_of([command, "--out", tmp_path / "other", *options], 2)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--strategies", "magic"], 2, "got 'magic'"),
        (["--strategies", "lbl:scop=x"], 2, "An option of lbl must be coefficient=... or scope=..."),
        (["--strategies", "loss-free:rate=-1"], 2, "rate must be above 0: got -1.0"),
        (["--strategies", "lbl:coefficient=nan"], 2, "coefficient must be a finite number"),
        (["--arch", "gpt2"], 2, "gpt2"),
        (["--stpes", "3"], 2, "--stpes"),
        (["--steps", "many"], 2, "many"),
        (["--workers", "0"], 2, "--workers must be at least 1: got 0"),
        (["--experts-per-token", "9"], 2, "must be at most --experts"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(text, tmp_path, error_of, options, code, message):
    line = error_of(["compare", "--data", text, "--out", tmp_path / "out", *SMALL, *options], code)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_missing_data_path_is_exit_code_2(tmp_path, error_of):
    assert "nowhere does not exist" in error_of(["train", "--data", "./nowhere", "--out", tmp_path / "out"], 2)
    assert not (tmp_path / "out").exists()


def _write(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        path = folder / f"{name}.txt"
        path.write_bytes(content)
    return folder


MANY_DOCUMENTS = "\n\n".join(f"word {i} " * 40 for i in range(40)).encode()


@pytest.mark.parametrize(
    ("files", "code", "message"),
    [
        ({}, 2, "contains none of these"),
        ({"one": b"a single document " * 500}, 1, "different documents"),
        ({"one": MANY_DOCUMENTS, "two": b"good\n\n\xff\xfe bad"}, 1, "UTF-8"),
        ({"one": MANY_DOCUMENTS, "two": b"a\n\nb\n\nc\n\nd\n\ne"}, 1, "sequence of 16 tokens"),
    ],
)
def test_bad_text_is_one_line(tmp_path, monkeypatch, error_of, files, code, message):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    folder = _write(tmp_path / "text", **files)
    line = error_of(["train", "--data", folder, "--out", tmp_path / "out", *SMALL], code)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_missing_or_damaged_run_folder_is_one_line(text, tmp_path, capsys, error_of):
    assert "does not" in error_of(["report", tmp_path / "nowhere"], 2)
    (tmp_path / "empty").mkdir()
    assert "must contain runs" in error_of(["report", tmp_path / "empty"], 2)
    run = tmp_path / "run"
    main(["train", "--data", str(text), "--out", str(run), *SMALL])
    capsys.readouterr()
    steps = (run / "steps.jsonl").read_text()
    (run / "steps.jsonl").write_text("{torn\n" + steps)
    line = error_of(["train", "--resume", "--data", text, "--out", run, *SMALL, "--seed", "1"], 1)
    assert "has seed=0, got 1" in line
    (run / "config.json").write_text("{")
    line = error_of(["train", "--resume", "--data", text, "--out", run, *SMALL], 1)
    assert "config.json must be JSON" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["compare", "--help"],
        ["report", "FOLDER"],
        ["recipes"],
        ["recipes", "switch"],
        ["recipes", "--json"],
    ],
)
def test_help_report_and_recipes_import_no_torch(text, tmp_path, arguments):
    if "FOLDER" in arguments:
        main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *SMALL])
        arguments = ["report", str(tmp_path / "run")]
    code = (
        "import sys\nfrom equipoise_lab.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_equipoise_is_called_equipoise():
    done = subprocess.run([sys.executable, "-m", "equipoise", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: equipoise [-h]"), done.stderr


@pytest.mark.parametrize(
    ("command", "advice"),
    [("train", "Fix that, then continue with --resume if a run had begun."), ("report", "Fix that.")],
)
def test_an_error_of_the_operating_system_is_one_line(tmp_path, monkeypatch, error_of, command, advice):
    def fail(options, command_line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"equipoise_lab.cli.{command}.run", fail)
    arguments = {"train": ["--out", tmp_path / "run"], "report": [tmp_path]}[command]
    assert error_of([command, *arguments], 1).endswith(f"No space left on device. {advice}")


def test_an_output_folder_that_cannot_be_made_is_one_line(text, tmp_path, error_of):
    (tmp_path / "file").touch()
    line = error_of(["train", "--data", text, "--out", tmp_path / "file" / "run", *SMALL], 1)
    assert f"--out must be a folder that can be written: {tmp_path / 'file'} is a file." in line


def test_the_reader_of_stdout_may_close_it(text, tmp_path):
    code = "import sys; from equipoise_lab.cli import main; main(sys.argv[1:])"
    run = tmp_path / "run"
    main(["train", "--data", str(text), "--out", str(run), *SMALL])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-u", "-c", code, "report", str(run)], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
