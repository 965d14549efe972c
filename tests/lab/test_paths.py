"""Paths of a user: near names, and folders that cannot be written."""

import os
from pathlib import Path

import pytest

from equipoise.errors import EquipoiseError
from equipoise_lab.paths import check_writable, suggest_paths


def test_near_names_are_of_the_deepest_folder_that_exists(tmp_path):
    (tmp_path / "texts" / "code").mkdir(parents=True)
    (tmp_path / "texts" / ".coda").touch()
    assert suggest_paths(tmp_path / "text") == f" Did you mean {tmp_path / 'texts'}?"
    assert suggest_paths(tmp_path / "txets" / "code") == f" Did you mean {tmp_path / 'texts' / 'code'}?"
    assert suggest_paths(tmp_path / "txets" / "other") == f" Did you mean {tmp_path / 'texts'}?"
    assert suggest_paths(tmp_path / "texts" / "cod") == f" Did you mean {tmp_path / 'texts' / 'code'}?"
    assert suggest_paths(tmp_path / "unlike") == ""
    assert suggest_paths(Path("korpus"), ["corpus"]) == " Did you mean corpus?"


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "a" / "b", "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    check_writable(tmp_path / "a" / "b", "--out")
    check_writable(tmp_path / "a", "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(EquipoiseError, match=r"--out must be a folder that can be written: .*file is a file\. Choose"):
        check_writable(tmp_path / "file" / "a", "--out")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("equipoise_lab.paths.tempfile.TemporaryFile", refuse)  # chmod would not stop root
    with pytest.raises(EquipoiseError, match=r"--page must be a folder .*written: .*new: Permission denied\."):
        check_writable(tmp_path / "new", "--page")
    assert os.listdir(tmp_path) == ["file"]
