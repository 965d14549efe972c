"""The command line as a person meets it: what it says, on which stream, with which exit code."""

import json
import os
import re
import subprocess
import sys

import pytest

from equipoise.recipes import RECIPES, split_strategy
from equipoise_lab.cli import main

SMALL = [
    "--vocab-size=300", "--steps=2", "--layers=1", "--width=32", "--experts=4", "--experts-per-token=2",
    "--expert-width=16", "--sequence-length=16", "--sequences=2", "--micro-batches=2", "--evaluation-sequences=4",
]  # fmt: skip


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("\n\n".join(f"{name} document {i} " * 30 for i in range(40)))
    return folder


def _fails(arguments, code, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("equipoise: error: ")]
    assert stop.value.code == code, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert out == ""
    return lines[0]


def test_json_is_all_there_is_on_stdout(text, tmp_path, capsys):
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


def test_train_prints_its_folder(text, tmp_path, capsys):
    main(["train", "--data", str(text), "--out", str(tmp_path / "run"), "--strategy", "lbl", *SMALL])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run")


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
def test_wrong_usage_is_one_line_and_exit_code_2(text, tmp_path, capsys, options, code, message):
    line = _fails(["compare", "--data", text, "--out", tmp_path / "out", *SMALL, *options], code, capsys)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_missing_data_path_is_exit_code_2(tmp_path, capsys):
    assert "nowhere does not exist" in _fails(["train", "--data", "./nowhere", "--out", tmp_path / "out"], 2, capsys)
    assert not (tmp_path / "out").exists()


def _write(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        path = folder / f"{name}.txt"
        path.write_bytes(content)
    return folder


MANY = "\n\n".join(f"word {i} " * 40 for i in range(40)).encode()


@pytest.mark.parametrize(
    ("files", "code", "message"),
    [
        ({}, 2, "holds none of these"),
        ({"one": b"a single document " * 500}, 1, "different documents"),
        ({"one": MANY, "two": b"good\n\n\xff\xfe bad"}, 1, "UTF-8"),
        ({"one": MANY, "two": b"a\n\nb\n\nc\n\nd\n\ne"}, 1, "sequence of 16 tokens"),
    ],
)
def test_bad_text_is_one_line(tmp_path, monkeypatch, capsys, files, code, message):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    folder = _write(tmp_path / "text", **files)
    line = _fails(["train", "--data", folder, "--out", tmp_path / "out", *SMALL], code, capsys)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_report_of_nothing_and_of_damage_is_one_line(text, tmp_path, capsys):
    assert "does not" in _fails(["report", tmp_path / "nowhere"], 2, capsys)
    (tmp_path / "empty").mkdir()
    assert "must hold runs" in _fails(["report", tmp_path / "empty"], 2, capsys)
    run = tmp_path / "run"
    main(["train", "--data", str(text), "--out", str(run), *SMALL])
    capsys.readouterr()
    whole = (run / "steps.jsonl").read_text()
    (run / "steps.jsonl").write_text("{torn\n" + whole)
    line = _fails(["train", "--resume", "--data", text, "--out", run, *SMALL, "--seed", "1"], 1, capsys)
    assert "has seed=0, got 1" in line
    (run / "config.json").write_text("{")
    line = _fails(["train", "--resume", "--data", text, "--out", run, *SMALL], 1, capsys)
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
def test_help_report_and_recipes_load_no_torch(text, tmp_path, arguments):
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


def test_recipes_are_listed_a_line_each(capsys):
    main(["recipes"])
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        [r.name, r.score_function, r.strategy] for r in RECIPES.values()
    ]
    assert err == ""


@pytest.mark.parametrize("width", [80, 120])
def test_recipes_fit_a_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    main(["recipes"])
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width
    for one in RECIPES.values():
        at = lines.index(f"{one.name}  {one.score_function}")
        for part in split_strategy(one.strategy):
            assert any(line.split()[-1] == part for line in lines[at : at + 7]), "no mechanism is broken"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_whole(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["recipes", name])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert RECIPES[name].strategy in out.splitlines(), "one line, to be copied"
    words = " ".join(out.split())
    for text in (RECIPES[name].summary, *RECIPES[name].notes):
        assert text in words
    for key, value, source in RECIPES[name].values():
        assert re.search(rf"{re.escape(key)} +{re.escape(value)} +{re.escape(source[:12])}", out)


def test_recipes_as_json(capsys):
    main(["recipes", "--json"])
    every = json.loads(capsys.readouterr().out)
    main(["recipes", "olmoe", "--json"])
    one = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in every] == list(RECIPES)
    assert one in every
    assert one["sources"] == dict(RECIPES["olmoe"].sources)
    assert one["notes"] == list(RECIPES["olmoe"].notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepseek-v5"], "got 'deepseek-v5'. Did you mean deepseek-v"),
        (["deepseek-v5", "--json"], "got 'deepseek-v5'"),
        (["qwen3"], "must have a source for every value"),
        (["switch", "olmoe"], "olmoe"),
    ],
)
def test_an_unknown_recipe_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert message in _fails(["recipes", *arguments], 2, capsys)


def test_what_the_machine_refuses_is_one_line(text, tmp_path, capsys):
    (tmp_path / "file").touch()
    line = _fails(["train", "--data", text, "--out", tmp_path / "file" / "run", *SMALL], 1, capsys)
    assert "Not a directory" in line


def test_a_reader_of_stdout_may_leave(text, tmp_path):
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
