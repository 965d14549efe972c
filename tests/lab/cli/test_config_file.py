"""``--config``: a file of options, read by train and compare, and written into every folder of theirs."""

import json
import re
from pathlib import Path

import pytest
import yaml

from equipoise_lab.cli import main
from equipoise_lab.cli.config_file import read_config_file
from equipoise_lab.cli.parser import parse
from equipoise_lab.records import is_new
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.config_file import OF_ONE_CALL, write_config_file
from equipoise_lab.train.option_groups import GROUPS

SMALL = """\
vocab-size: 300
steps: 2
layers: 1
width: 32
experts: 4
experts-per-token: 2
expert-width: 16
sequence-length: 16
sequences: 2
micro-batches: 2
evaluation-sequences: 4
save-model: false
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes my.yaml into the current folder, which is empty, and returns its name."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def write(text, name="my.yaml"):
        (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def _numbers(run):
    """What a run wrote, without times of the clock."""
    rows = [
        json.loads(line) for name in ("steps", "loads") for line in (run / f"{name}.jsonl").read_text().splitlines()
    ]
    result = json.loads((run / "result.json").read_text())
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in (*rows, result)]


# ---- what is written ----


def test_the_file_of_a_run_trains_the_same_run(text, file, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    (text.parent / "my.yaml").write_text(SMALL)
    main(["train", "--config", "my.yaml", "--data", text.name, "--out", "one", "--strategy", "loss-free:rate=1e-2"])
    other = tmp_path / "here"
    monkeypatch.chdir(other)  # the text is still there: its path is absolute in the file
    main(["train", "--config", "../one/run.yaml", "--out", "again"])
    assert _numbers(tmp_path / "one") == _numbers(other / "again")
    assert (tmp_path / "one" / "run.yaml").read_bytes() == (other / "again" / "run.yaml").read_bytes()
    command = json.loads((other / "again" / "config.json").read_text())["command"]
    assert command == "equipoise train --config ../one/run.yaml --out again"


def test_the_files_of_a_comparison_train_it_and_one_of_its_runs_again(text, file, tmp_path):
    strategies = "strategies:\n- none\n- lbl:scope=global_batch,coefficient=1e-2\n"
    path = file(f"{SMALL}workers: 1\ndata: {text}\n{strategies}")
    main(["compare", "--config", path, "--out", "one"])
    main(["compare", "--config", "one/compare.yaml", "--out", "again"])
    main(["train", "--config", "one/none_seed0/run.yaml", "--out", "alone"])
    folders = [tmp_path / "here" / name for name in ("one/none_seed0", "again/none_seed0", "alone")]
    assert _numbers(folders[0]) == _numbers(folders[1]) == _numbers(folders[2])


@pytest.mark.parametrize(
    "options",
    [
        Train(out="x", strategy="none", learning_rate=1e-5, then="quantile", switch_at=3, save_model=False),
        Train(out="x", strategy="on", text_key="1e3", data="hf:owner/name", dtype="float32", shuffled=True),
        Compare(out="x", strategies=("none", "null", "lbl:scope=sequence,coefficient=1e-4"), seeds=2, workers=1),
    ],
)
def test_what_is_written_is_read_as_the_same_options(tmp_path, options):
    options = type(options)(**{**vars(options), "out": tmp_path})
    write_config_file(options)
    (path,) = tmp_path.iterdir()
    command = type(options).__name__.lower()
    assert parse([command, "--config", str(path), "--out", str(tmp_path)]) == options


def test_all_that_determines_the_numbers_is_written_in_groups(tmp_path):
    write_config_file(Compare(out=tmp_path))
    text = (tmp_path / "compare.yaml").read_text()
    written = {name.replace("-", "_") for name in yaml.safe_load(text)}
    unset = {name for name, value in vars(Compare(out=tmp_path)).items() if value is None}
    assert written == vars(Compare(out=tmp_path)).keys() - set(OF_ONE_CALL) - unset
    assert re.findall(r"^# (\w+)$", text, re.MULTILINE) == [group for group in GROUPS if group != "trackers"]
    assert "equipoise compare --config compare.yaml --out NEW_FOLDER" in text and "version 0" in text


# ---- what is read ----


def test_the_command_line_wins_over_the_file_and_may_turn_off_what_it_turns_on(file):
    path = file("steps: 7\nlearning_rate: 1e-3\nshuffled: yes\nsave-model: false\nstrategy: none\nout: there\nthen:\n")
    options = parse(["train", f"--config={path}", "--steps", "9", "--no-shuffled", "--save-model"])
    assert (options.steps, options.learning_rate, options.shuffled, options.save_model) == (9, 1e-3, False, True)
    assert (options.strategy, str(options.out), options.then) == ("none", "there", None)
    assert parse(["train", "--config", path]).shuffled


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning-rate: 1e-3", "learning_rate", 1e-3),
        ("learning-rate: .5", "learning_rate", 0.5),
        ("steps: '80'", "steps", 80),
        ("strategy: none", "strategy", "none"),
        ("strategy: off", "strategy", "off"),
        ("strategy: no", "strategy", "no"),
        ("strategy: 'null'", "strategy", "null"),
        ("strategy: lbl:scope=global_batch,coefficient=1e-2", "strategy", "lbl:scope=global_batch,coefficient=1e-2"),
        ("then: none", "then", "none"),
        ("then: null", "then", None),
        ("then: ~", "then", None),
        ("model:", "model", None),
        ("shuffled: on", "shuffled", True),
        ("shuffled: False", "shuffled", False),
        ("text-key: 2024-01-01", "text_key", "2024-01-01"),
        ("\ufeffsteps: 3 # a note", "steps", 3),
    ],
)
def test_a_value_means_what_it_means_on_the_command_line(file, line, name, value):
    assert read_config_file(Path(file(line)), "train").values == {name: value}


@pytest.mark.parametrize(
    "text",
    [
        "strategies:\n- none\n- lbl:scope=sequence,coefficient=1e-4",
        "strategies: [none, 'lbl:scope=sequence,coefficient=1e-4']",
    ],
)
def test_strategies_are_a_list(file, text):
    assert (
        parse(["compare", "--out", "x", "--config", file(text)]).strategies[1] == "lbl:scope=sequence,coefficient=1e-4"
    )


def test_a_home_folder_in_a_file_is_that_of_the_user(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(parse(["train", "--config", file("out: ~/runs/one")]).out) == "/home/somebody/runs/one"


# ---- what is wrong ----

WRONG = [
    ("train", "stpes: 3", "one of `equipoise train`: got stpes in my.yaml, line 1. Did you mean steps?$"),
    ("train", "a: 1", "got a in my.yaml, line 1. `equipoise train --help` lists them.$"),
    ("train", "--steps: 3", "got --steps in my.yaml, line 1. Did you mean steps?"),
    ("train", "no-save-model: true", "got no-save-model in my.yaml, line 1. Write save-model: false.$"),
    ("train", "steps: 3\nsteps: 4", "must have each option once: got steps in lines 1 and 2. Remove one.$"),
    ("train", "micro-batches: 3\nmicro_batches: 4", "got micro_batches in lines 1 and 2."),
    ("train", "\nsteps: many", "steps in my.yaml, line 2, must be a whole number: got 'many'.$"),
    ("train", "steps: 1.5", "must be a whole number: got '1.5'.$"),
    ("train", "steps: 4.0", "must be a whole number: got '4.0'.$"),
    ("train", f"steps: 1{'0' * 5000}", r"must be a whole number: got '10{59}\.\.\.'.$"),
    ("train", 'model: ""', "model in my.yaml, line 1, must have a value: got an empty one. Write one, or remove"),
    ("compare", 'strategies: [none, ""]', "must have a value: got an empty one"),
    ("train", "steps:", "steps in my.yaml, line 1, must have a value: got none. Write one, or remove the line.$"),
    ("train", "steps: [1, 2]", "must be a whole number: got a list.$"),
    ("train", "learning-rate: high", "must be a number: got 'high'.$"),
    ("train", "shuffled: perhaps", "must be true or false: got 'perhaps'.$"),
    ("train", "arch: qwen3moe", "must be one of glm4_moe, .*: got 'qwen3moe'. Did you mean qwen3_moe?$"),
    ("train", "strategy: null", "must have a value: got null. .* The strategy without balancing is none.$"),
    ("train", "strategy: [none]", "strategy in my.yaml, line 1, must be a text: got a list.$"),
    ("train", "strategy: {lbl: 1}", "must be a text: got names with values of their own.$"),
    ("train", "strategy: lbl: 1", "must be YAML, line 1: got a second colon"),
    ("train", "strategies: [none]", "strategies in line 1 is one of `equipoise compare`. Use `equipoise comp"),
    ("compare", "strategy: none", "Use `equipoise train --config my.yaml`, or write strategies in its place.$"),
    ("train", "tracker: tensorboard", "got 'tensorboard'. Write each in a line after it: - tensorboard$"),
    ("compare", "strategies: none", "must be a list: got 'none'. Write each in a line after it: - none$"),
    ("compare", "strategies: [none, null]", "must have a value: got null"),
    ("compare", "strategies: [lbl:scope=sequence,coefficient=1]", "a comma ends a strategy, so 'coefficient=1' stands"),
    ("train", "", "my.yaml must hold options: it holds none. Write a line each, such as .* have run.yaml"),
    ("train", "# nothing\n", "it holds none. Write"),
    ("train", "steps 80", "must hold options: got 'steps 80'. Write"),
    ("train", "- steps", "must hold options: got a list. Write"),
    ("train", "steps: 80\n\tlayers: 2", "must be YAML, line 2: got a tab. Write spaces in its place.$"),
    ("train", "steps: 80\nlayers", "must be YAML, line .*: each line must be name: value, with a space after"),
    ("train", "steps: 80\nlayers:2\nwidth: 32", "each line must be name: value, with a space after the colon.$"),
    ("train", "steps: 'a", "must be YAML, line 1: .* Correct that line.$"),
    ("train", b"\x89PNG\xff\x00", "my.yaml must be a text of options: it is no text in UTF-8. Write"),
    ("train", "steps: 3\x00", "must be YAML: it has characters"),
    ("train", "[" * 5000, "must be YAML"),
    ("train", "? [1]\n: 2", "line 1, must begin with the name of an option: got a list.$"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "text", "message"), WRONG)
def test_a_wrong_file_is_one_sentence(file, error_of, command, text, message):
    line = error_of([command, "--out", "run", "--config", file(text)], 2)
    assert re.search(message.replace("?$", r"\?$"), line), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "mi.yaml"], r"must be a file of options: mi.yaml does not exist. Did you mean my.yaml\?$"),
        (["--config", "."], r"must be a file: \. is a folder. Give the file.$"),
        (["--config"], "--config needs a value: got none."),
        (["--config", "my.yaml", "--config", "b.yaml"], "must be given once: got my.yaml and b.yaml. Put all"),
        (["--config", "my.yaml", "--stpes", "3"], r"got --stpes. Did you mean --steps\?"),
        (["--config", "my.yaml", "--shufled"], r"got --shufled. Did you mean --no-shuffled\?"),
    ],
)
def test_a_wrong_option_beside_the_file_is_one_sentence(file, error_of, arguments, message):
    file("steps: 80\nshuffled: true")
    line = error_of(["train", "--out", "run", *arguments], 2)
    assert re.search(message, line), line


def test_the_folder_of_a_run_and_its_record_name_the_file_in_it(file, tmp_path, error_of):
    write_config_file(Train(out=tmp_path))
    (tmp_path / "config.json").write_text('{"format": 1}')
    for path in (tmp_path, tmp_path / "config.json"):
        line = error_of(["train", "--out", "run", "--config", path], 2)
        assert line.endswith(f"Did you mean {tmp_path / 'run.yaml'}?")


def test_an_error_says_which_line_of_the_file_sets_the_option(file, error_of):
    path = file("layers: 2\nsteps: 0\nstrategy: lbl:scope=global")
    assert error_of(["train", "--out", "x", "--config", path], 2).endswith("got 0. my.yaml sets steps in line 2.")
    line = error_of(["train", "--out", "x", "--config", path, "--steps", "0"], 2)
    assert line.endswith("got 0.")
    line = error_of(["train", "--out", "x", "--config", path, "--steps", "1"], 2)
    assert line.endswith("my.yaml sets strategy in line 3.")
    path = file("strategies:\n- none\n- none\n")
    line = error_of(["compare", "--out", "x", "--config", path], 2)
    assert line.endswith("my.yaml sets strategies in line 1.")
    line = error_of(["train", "--out", "x", "--config", file("micro-batches: 3\nlayers: 2"), "--balance-batch", "2"], 2)
    assert "--balance-batch must divide --micro-batches" in line


# ---- folders ----


def test_a_folder_with_its_file_and_no_step_is_new(file, tmp_path):
    run = tmp_path / "comparison" / "none_seed0"
    run.mkdir(parents=True)
    write_config_file(Train(out=run))
    assert not is_new(run)  # it may be somebody's own file
    (run / "config.json").write_text('{"format": 1, "strategy": "none"}')
    assert is_new(run)
    write_config_file(Compare(out=run.parent))
    assert not is_new(run.parent)
    (run.parent / "compare.json").write_text("{}")
    (run / ".run.yaml.tmp").touch()
    assert is_new(run.parent)


def test_a_run_goes_on_with_its_own_file(text, file, tmp_path, monkeypatch, capsys, error_of):
    monkeypatch.chdir(text.parent)
    (text.parent / "my.yaml").write_text(SMALL)
    options = ["--config", "my.yaml", "--data", text.name, "--strategies", "none", "--workers", "1"]
    main(["compare", "--out", "one", *options])
    monkeypatch.chdir(tmp_path / "here")  # where the relative path of the record names nothing
    (tmp_path / "one" / "none_seed0" / "result.json").unlink()
    written = (tmp_path / "one" / "none_seed0" / "run.yaml").read_text()
    again = ["--config", "../one/compare.yaml", "--out", "../one", "--resume"]
    main(["compare", *again])
    assert (tmp_path / "one" / "none_seed0" / "run.yaml").read_text() == written
    capsys.readouterr()
    assert "must keep its options: ../one has steps=2, got 3" in error_of(["compare", *again, "--steps", "3"], 1)


def test_a_comparison_that_fails_before_a_step_leaves_nothing(text, file, tmp_path, monkeypatch, error_of):
    from equipoise_lab.train import compare

    path = file(f"{SMALL}workers: 1\ndata: {text}\nout: one\nstrategies:\n- none\n")

    def fail(*arguments):
        assert {one.name for one in (tmp_path / "here" / "one").iterdir()} == {".lock", "compare.json", "compare.yaml"}
        raise compare.EquipoiseError("the disk must work: it does not.")

    with monkeypatch.context() as broken:
        broken.setattr(compare, "_train_all", fail)
        error_of(["compare", "--config", path], 1)
    assert not (tmp_path / "here" / "one").exists()
    main(["compare", "--config", path])
