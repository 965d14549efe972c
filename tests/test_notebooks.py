"""The notebooks of the handbook run as they are stored, and become pages with their pictures."""

import re
import subprocess
import sys

import nbformat
import notebooks
import pytest

by_name = pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=pytest.mark.xdist_group(f"notebook {p.stem}")) for p in notebooks.NOTEBOOKS],
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = notebooks.execute(path, tmp_path)
    assert notebooks.problems(executed) == []
    stored = nbformat.read(path, as_version=4)
    assert [_kinds(cell) for cell in executed.cells] == [_kinds(cell) for cell in stored.cells]


def _kinds(cell):
    """What is stored of a cell besides numbers that other machines may not share."""
    return cell.source, [sorted(output.get("data", [output.output_type])) for output in cell.get("outputs", [])]


@by_name
def test_a_stored_notebook_has_nothing_that_changes(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata == notebooks.METADATA
    assert all(cell.metadata.keys() <= {"alt", "tags"} for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def _check(*names):
    command = [sys.executable, notebooks.__file__, "--check", *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_stored_notebooks_pass_the_check():
    done = _check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": good") == len(notebooks.NOTEBOOKS) == 3


def test_the_check_names_an_unknown_notebook():
    done = _check("six_minutes")
    assert done.returncode == 2 and "no notebook six_minutes" in done.stderr


def _cell(*outputs, count=1):
    return nbformat.v4.new_code_cell("work()", execution_count=count, outputs=list(outputs))


def _picture(alt, data="iVBORw0KGgo="):
    metadata = {"image/png": {"alt": alt}} if alt else {}
    return nbformat.v4.new_output("display_data", {"image/png": data}, metadata=metadata)


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (_cell(count=None), "was not executed"),
        (_cell(nbformat.v4.new_output("error", ename="E", evalue="broken", traceback=[])), "an error or a warning"),
        (_cell(nbformat.v4.new_output("stream", name="stderr", text="beware")), "an error or a warning: beware"),
        (_cell(nbformat.v4.new_output("stream", text="<A at 0x7f00112233>")), "an address in memory"),
        (_cell(nbformat.v4.new_output("stream", text="wrote /tmp/x")), "a path of the machine"),
        (_cell(_picture("")), "without alternative text"),
        (_cell(_picture("all is even", "A" * 100_001)), "at most 100,000"),
        (_cell(*[nbformat.v4.new_output("stream", text="A" * 99_000)] * 4), "at most 300,000"),
    ],
)
def test_what_must_not_be_stored(cell, problem):
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=notebooks.METADATA)
    (found,) = notebooks.problems(notebook)
    assert problem in found


def test_what_may_be_stored():
    cell = _cell(nbformat.v4.new_output("stream", text="MaxVio 0.3"), _picture("all is even"))
    assert notebooks.problems(nbformat.v4.new_notebook(cells=[cell], metadata=notebooks.METADATA)) == []


@by_name
def test_a_notebook_becomes_a_page_with_its_pictures(path, tmp_path):
    page = notebooks.to_markdown(path, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / f"{path.stem}.md" and text.startswith("# ")
    pictures = re.findall(r"^!\[(.+)\]\((.+)\)$", text, re.MULTILINE)
    stored = nbformat.read(path, as_version=4)
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    alts = [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    assert [alt for alt, _ in pictures] == alts and alts
    for _, name in pictures:
        assert name.startswith(f"{path.stem}_files/") and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh", "text"} and set(fences[1::2]) == {""}
    assert "%%" not in text
