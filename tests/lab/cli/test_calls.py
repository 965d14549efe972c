"""What a new user types, right and wrong (``calls``): exit codes, streams, and folders that stay free."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import calls
import pytest

from equipoise_lab.cli import main

LONGEST = 400  # characters of an error: five lines of a terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with text, runs and files, in which the calls are made."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(folder.parent / "cache"))
        patch.chdir(folder)
        calls.make_folder(folder)
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Makes a call without ``new`` in the folder: its exit code, stdout and stderr."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(folder.parent / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(folder)
    shutil.rmtree("new", ignore_errors=True)
    capsys.readouterr()

    def call(line):
        code = 0
        try:
            main(calls.arguments(line))
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def _assert_error(outcome, wrong_code, phrase):
    code, stdout, stderr = outcome
    *before, last = stderr.splitlines()
    assert code == wrong_code and stdout == "", (code, stdout, stderr)
    assert last.startswith("equipoise: error: ") and phrase in last, stderr
    assert len(last) <= LONGEST, f"{len(last)} characters: {last}"
    assert "Traceback" not in stderr and not any("error" in line for line in before), stderr


def test_every_command_has_a_right_and_a_wrong_call():
    assert len(set(calls.RIGHT)) == len(calls.RIGHT)
    for command in calls.COMMANDS:
        for lines in (calls.RIGHT, [wrong.call for wrong in calls.WRONG]):
            assert any(line.split()[:1] == [command] for line in lines), command


@pytest.mark.parametrize("line", calls.RIGHT)
def test_a_right_call_succeeds_and_prints_no_progress_on_stdout(call, line):
    code, stdout, stderr = call(line)
    assert code == 0, stderr
    assert stdout.strip() and "Traceback" not in stderr and "equipoise: error" not in stderr
    command = line.split()[0]
    assert not re.search(r"step \d+/\d+|^reading|^loading|^evaluating", stdout, re.MULTILINE), "progress on stdout"
    if "--json" in line:
        json.loads(stdout)
    if command == "train" and not re.search(" (-h|--help)$", line):
        assert stdout == f"{calls.arguments(line)[calls.arguments(line).index('--out') + 1]}\n"
        assert Path(stdout.strip(), "run.yaml").is_file()
    if command == "report" and "--help" not in line:
        assert Path(stdout.strip()).is_file()
    if command in ("recipes", "--version", "--help", "-h") or "-h" in line:
        assert stderr == ""


@pytest.mark.parametrize("wrong", calls.WRONG, ids=lambda wrong: wrong.call)
def test_a_wrong_call_is_one_sentence_and_claims_nothing(call, folder, wrong):
    before = sorted(folder.rglob("*"))
    _assert_error(call(wrong.call), wrong.code, wrong.phrase)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("wrong", "right"), calls.CORRECTED)
def test_after_a_wrong_call_the_right_one_works_in_the_same_folder(call, wrong, right):
    code, _, stderr = call(wrong)
    assert code in (1, 2) and stderr.splitlines()[-1].startswith("equipoise: error: ")
    code, stdout, stderr = call(right)
    assert code == 0 and stdout, stderr


def test_a_call_that_diverges_keeps_its_records_and_says_where(call):
    _assert_error(call(f"{calls.TRAIN} --learning-rate 1e9"), 1, "The records are in new. Use a lower --learning-rate.")
    assert Path("new/steps.jsonl").exists()


def test_ctrl_c_is_one_line_that_says_how_to_go_on(folder, tmp_path):
    arguments = calls.arguments(f"train --out {tmp_path / 'run'} --data my_text SMALL --steps 100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "equipoise", *arguments],
        cwd=folder,
        env={**os.environ, "EQUIPOISE_CACHE": str(folder.parent / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "step 1/" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    *_, last = stderr.splitlines()
    assert (process.returncode, stdout) == (130, "") and "Traceback" not in stderr
    assert last.startswith("equipoise: stopped.") and "--resume" in last


def test_a_stream_that_lacks_a_character_gets_an_escape(folder):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    code = "from equipoise_lab.cli import main\nmain(['--version'])\nprint('\u2212')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("\\u2212\n"), done.stderr


@pytest.mark.parametrize(("line", "code"), [("--version", 0), ("trian", 2), ("report nowhere", 2), ("recipes", 0)])
def test_a_process_of_its_own_ends_with_the_code(folder, line, code):
    done = subprocess.run(
        [sys.executable, "-m", "equipoise", *calls.arguments(line)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == code
    assert bool(done.stdout) == (code == 0) and bool(done.stderr) == (code != 0)
    assert "Traceback" not in done.stderr
