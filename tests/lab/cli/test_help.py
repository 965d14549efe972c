"""Help: groups, strategies first, every option in one of them, and examples that the parser accepts."""

import dataclasses
import re
import shlex
from itertools import pairwise

import pytest

from equipoise_lab.cli.parser import EXAMPLES, NAMES, parse
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.config_file import write_config_file
from equipoise_lab.train.option_groups import GROUPS


def _help(capsys, *command):
    with pytest.raises(SystemExit) as stop:
        parse([*command, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "compare"])
def test_options_are_in_groups_with_strategies_first(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    shown = _help(capsys, command)
    titles = re.findall(r"^\W+(\w+) options\W*$", shown, re.MULTILINE)
    assert titles == ["strategy", "folder", "text", "model", "training", "trackers", "evaluation", "machine"]
    first, second = (shown.index(f"{title} options") for title in titles[:2])
    assert first < shown.index("--strateg") < shown.index("--seed") < second < shown.index("--out PATH")
    assert "None" not in shown and "False" not in shown
    assert max(map(len, shown.split("examples:")[0].split("options", 1)[1].splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", ["", *NAMES])
def test_a_help_fills_the_terminal_and_is_no_wider(capsys, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = _help(capsys, *filter(None, [command])).split("examples:")[0].splitlines()
    assert max(map(len, lines)) <= width
    texts = [re.sub(r"\(required\)|\(default: .*", "", line.strip(" │|")) for line in lines if "options" not in line]
    for before, after in pairwise(texts):  # no break where the next word had room
        if re.match(r"[a-z]+ ", after) and re.search(r"[a-z,]$", before) and "--" not in before:
            assert len(before) + len(after.split()[0]) >= width - 30, (before, after)


def test_the_first_option_is_the_config_file(capsys):
    for command in ("train", "compare"):
        flags = re.findall(r"^. (?:-h, )?(--[a-z-]+)", _help(capsys, command), re.MULTILINE)
        assert flags[:2] == ["--help", "--config"]


@pytest.mark.parametrize("options", [Train, Compare])
def test_every_option_is_in_one_group(options):
    names = [name for group in GROUPS.values() for name in group]
    assert len(set(names)) == len(names)
    assert {field.name for field in dataclasses.fields(options)} <= set(names)


def test_options_in_groups_give_the_same_values_as_the_class(tmp_path):
    strategies = ["--strategies", "none", "loss-free"]
    assert parse(["compare", "--out", "run", *strategies, "--no-save-model"]) == Compare(
        out=type(tmp_path)("run"), strategies=("none", "loss-free"), save_model=False
    )
    assert parse(["train", "--out", "run"]) == Train(out=type(tmp_path)("run"))


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_end_the_help_and_are_accepted(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/one").mkdir(parents=True)
    write_config_file(Train(out=tmp_path / "runs/one"))  # an example reads it
    shown = _help(capsys, *filter(None, [command]))
    assert shown.rstrip().endswith("\n  ".join(["examples:", *EXAMPLES[command]]))
    for line in EXAMPLES[command]:
        name, *arguments = shlex.split(line)
        assert name == "equipoise"
        if "--help" not in arguments:
            parse(arguments)
