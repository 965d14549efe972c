"""What stands in a fence on a page works: Python runs, commands are understood, diffs apply."""

import re
import shlex
import sys
from types import ModuleType

import pytest
import torch.distributed as dist
from pages import PAGES, ROOT, blocks, name_of, program

from equipoise_lab.cli.parser import parse

LANGUAGES = ("diff", "json", "python", "sh", "setup", "text", "toml", "yaml")  # those of text are pictures and output
COMMANDS = ("cd", "export", "git", "pip", "srun")  # of others: not looked at
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder, and no process group that a page leaves behind."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


@every_page
def test_the_python_of_a_page_runs(page, workplace, monkeypatch):
    """One page is one program: its blocks share their names, in the order of the page."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)  # pickle looks classes up there
    exec(compile(program(page), str(page), "exec"), vars(module))


@every_page
def test_a_fence_names_its_language(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}, line {block.line}: {block.language!r} is not in {LANGUAGES}"


def _commands(page):
    for block in blocks(page):
        if block.language == "sh":
            for line in re.sub(r"\\\n\s*", " ", block.code).splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words:
                    yield words, f"{page.name}, line {block.line}: {line}"


def _check(words, targets):
    program, *rest = words
    if program == "torchrun":
        module = rest.index("-m") if "-m" in rest else None
        files = [word for word in rest if word.endswith(".py")]
        program, rest = ("python", rest[module:] if module is not None else files[:1])
    if program == "python" and rest[:2] == ["-m", "equipoise"]:
        program, rest = "equipoise", rest[2:]
    if program == "equipoise":
        rest = [word for word in rest if word not in (">", "|")]
        assert parse(rest)
    elif program == "python" and rest[0] != "-m":
        assert (ROOT / rest[0]).exists()
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= targets
    else:
        assert program in (*COMMANDS, "python")


@every_page
def test_the_commands_of_a_page_are_understood(page):
    """Those of equipoise are parsed, with all their options; scripts exist, and so do the targets of make."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words, where in _commands(page):
        try:
            _check(words, targets)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where}: {error}") from error
