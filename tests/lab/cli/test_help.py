"""Help: groups, strategies first, every option in one of them, and examples that the parser accepts."""

import dataclasses
import re
import shlex

import pytest

from equipoise_lab.cli.groups import GROUPS
from equipoise_lab.cli.parser import EXAMPLES, parse
from equipoise_lab.train.config import Compare, Train


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
def test_examples_end_the_help_and_are_accepted(capsys, command):
    shown = _help(capsys, *filter(None, [command]))
    assert shown.rstrip().endswith("\n  ".join(["examples:", *EXAMPLES[command]]))
    for line in EXAMPLES[command]:
        name, *arguments = shlex.split(line)
        assert name == "equipoise"
        if "--help" not in arguments:
            parse(arguments)
