"""What stands in a fence on a page works: Python and shell commands run, diffs apply."""

import sys
from types import ModuleType

import pytest
import torch.distributed as dist
from pages import PAGES, blocks, name_of, program, prose
from shell import shell_in

# Blocks of text are pictures and output. Those of py need a framework: its own tests run them.
LANGUAGES = ("diff", "json", "py", "python", "sh", "setup", "text", "toml", "yaml")
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder, and no process group that a page leaves behind."""
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


@every_page
def test_the_code_of_a_page_runs(page, workplace, monkeypatch):
    """One page is one program: its blocks share their names and the folder, in the order of the page."""
    module = ModuleType("__main__")
    module.__dict__["shell"] = shell_in(workplace / "bin")
    monkeypatch.setitem(sys.modules, "__main__", module)  # pickle looks classes up there
    exec(compile(program(page), str(page), "exec"), vars(module))


@every_page
def test_a_fence_names_its_language(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}, line {block.line}: {block.language!r} is not in {LANGUAGES}"


@every_page
def test_a_page_is_at_most_two_screens_of_prose(page):
    """A screen holds about 500 words. A page that needs more is two pages."""
    words = len(prose(page))
    assert words <= 1000, f"{name_of(page)} has {words} words of prose: cut it to 1,000, or make two pages of it"
