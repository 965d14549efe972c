import pytest

from equipoise_lab.cli import main


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder of text with two domains."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("\n\n".join(f"{name} document {i} " * 30 for i in range(40)))
    return folder


@pytest.fixture
def error_of(capsys):
    """Runs a command that must fail with ``code``, and returns its one line of error."""

    def error_of(arguments, code):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("equipoise: error: ")]
        assert stop.value.code == code, err
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert out == ""
        return lines[0]

    return error_of
