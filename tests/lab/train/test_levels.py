"""Groups of domains by script, language and other levels."""

import json

import pytest

from equipoise import UsageError
from equipoise_lab.train.levels import levels_of, script_of
from equipoise_lab.train.location import CORPUS
from equipoise_lab.train.text import find_text, stream_text


def test_the_script_of_a_text_is_the_script_of_most_letters():
    assert script_of("Marseille 12") == "Latin" and script_of("床前明月光 abc") == "Han"
    assert script_of("12 + 3") == "none" and script_of("москва") == "Cyrillic" and script_of("") == "none"
    assert script_of("a" * 20_000 + "月" * 30_000) == "Latin", "the first 20,000 characters count"


def test_the_corpus_has_scripts_and_languages():
    texts = {name: "".join(read()[:2]) for name, read in stream_text(None, lambda text: None)}
    levels = levels_of(None, texts)
    by_domain = {name: (levels["script"][i], levels["language"][i]) for i, name in enumerate(texts)}
    assert by_domain["law_zh"] == by_domain["verse_zh"] == ("Han", "Chinese")
    assert by_domain["bible_en"] == by_domain["speech_en"] == ("Latin", "English")
    assert by_domain["law_fr"] == ("Latin", "French") and len(texts) == 8
    assert set(json.loads((CORPUS / "levels.json").read_text())["language"]) == set(texts)


def test_a_level_that_groups_nothing_is_left_out(tmp_path):
    (tmp_path / "levels.json").write_text('{"genre": {"a": "x", "b": "x", "c": "y"}, "own": {"a": 1, "b": 2, "c": 3}}')
    assert levels_of(tmp_path, {"a": "a", "b": "b", "c": "c"}) == {"genre": ["x", "x", "y"]}
    assert levels_of(tmp_path / "nowhere", {"a": "a", "b": "b", "c": "道"}) == {"script": ["Latin", "Latin", "Han"]}


@pytest.mark.parametrize("content", ["{", "[]", '{"genre": {"a": "x"}}', '{"genre": 3}'])
def test_a_damaged_levels_file_is_an_error(tmp_path, content):
    (tmp_path / "levels.json").write_text(content)
    with pytest.raises(UsageError, match="levels.json must be JSON like"):
        levels_of(tmp_path, {"a": "a", "b": "b"})


def test_the_levels_file_is_not_a_domain(tmp_path):
    (tmp_path / "levels.json").write_text("{}")
    (tmp_path / "a.txt").write_text("some text")
    assert list(find_text(tmp_path, lambda text: None).read(lambda text: None, print)) == ["a"]
