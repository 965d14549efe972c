"""The code on the pages of README and handbook: what is in a fence, and what a page runs unseen."""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "ROOT", "Block", "blocks", "name_of", "program", "prose"]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^( *)(?:```(\w*)[^\n]*\n(.*?)^ *```|<!-- setup\n(.*?)-->)$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str  # "setup" for code that a page runs and does not show
    code: str
    line: int  # of its first line in the page


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fences of a page, and its comments ``<!-- setup ... -->``, in their order."""
    text = page.read_text(encoding="utf-8")
    page_blocks = []
    for match in _BLOCK.finditer(text):
        indent, language, code, setup = match.groups()
        code = re.sub(rf"^{indent}", "", code if setup is None else setup, flags=re.MULTILINE)
        page_blocks.append(
            Block("setup" if setup is not None else language, code, text[: match.start()].count("\n") + 2)
        )
    return page_blocks


def program(page: Path) -> str:
    """What a page runs, as one program: of a diff what is there after it, of shell code ``shell(code)``.

    Line numbers are those of the page.
    """
    lines: list[str] = []
    for block in blocks(page):
        if block.language not in ("python", "setup", "diff", "sh"):
            continue
        code = block.code.splitlines()
        if block.language == "diff":
            code = ["" if line.startswith("-") else line[1:] for line in code]
        elif block.language == "sh":
            code = [f"shell({block.code!r})"]
        lines += [""] * (block.line - 1 - len(lines)) + code
    return "\n".join(lines)


def prose(page: Path) -> list[str]:
    """The words of sentences and lists: no code, tables, headings, comments, addresses of links and API blocks."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *\||#|:::|!\[|\?\?\?|!!!).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "", text).split()
