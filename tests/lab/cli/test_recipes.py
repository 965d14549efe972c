"""``equipoise recipes``: a list, one recipe with its sources, JSON."""

import json
import re

import pytest

from equipoise.recipes import RECIPES, split_strategy
from equipoise_lab.cli import main


def _without_colors(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_recipes_are_listed_a_line_each(capsys):
    main(["recipes"])
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        [r.name, r.score_function, r.strategy] for r in RECIPES.values()
    ]
    assert err == ""


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_fits_a_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    main(["recipes"])
    lines = [line.rstrip() for line in _without_colors(capsys.readouterr().out).splitlines()]
    assert max(map(len, lines)) <= width
    for one in RECIPES.values():
        start = lines.index(f"{one.name}  {one.score_function}")
        for part in split_strategy(one.strategy):
            assert any(line.split()[-1] == part for line in lines[start : start + 7]), "no mechanism is broken"


@pytest.mark.parametrize("name", RECIPES)
def test_one_recipe_is_shown_with_every_value_and_source(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["recipes", name])
    out = _without_colors(capsys.readouterr().out)
    assert RECIPES[name].strategy in out.splitlines(), "on one line, to be copied"
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
def test_an_unknown_recipe_is_one_line_and_exit_code_2(error_of, arguments, message):
    assert message in error_of(["recipes", *arguments], 2)
