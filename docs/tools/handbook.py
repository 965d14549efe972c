"""Builds the handbook: ``python docs/tools/handbook.py``, or ``make docs``.

``docs/`` is copied to ``build/docs``. Notebooks become pages there. A link to a file outside ``docs/`` becomes the name
of the file, since a site does not have it. Then Zensical builds ``build/site`` strictly: a broken link or reference
fails.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from notebooks import to_markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = ROOT / "zensical.toml"
STAGED = ROOT / "build" / "docs"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)
_SETUP = re.compile(r"^<!-- setup\n.*?-->\n", re.DOTALL | re.MULTILINE)


def navigation() -> list[str]:
    """The pages of the navigation, in its order."""

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from pages(list(entry.values()))
        else:
            for part in entry:
                yield from pages(part)

    return list(pages(tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]["nav"]))


def as_page(text: str, folder: Path) -> str:
    """The text of a page in ``folder`` as the site has it.

    >>> as_page("[Tour](tour.ipynb), [code](../src/a.py), [site](https://a.b)", DOCS)
    '[Tour](tour.md), code (`src/a.py`), [site](https://a.b)'
    """

    def link(match: re.Match[str]) -> str:
        title, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match.group(0)
        file = (folder / path).resolve()
        if file.is_relative_to(DOCS.resolve()):
            return f"[{title}]({re.sub(r'[.]ipynb$', '.md', path)}{'#' + anchor if anchor else ''})"
        name = file.relative_to(ROOT.resolve()).as_posix()
        return title if name in title else f"{title} (`{name}`)"

    parts = FENCE.split(_SETUP.sub("", text))
    return "".join(part if part.lstrip().startswith("```") else LINK.sub(link, part) for part in parts)


def stage() -> None:
    """Copies ``docs/`` to ``build/docs``, as the site has it."""
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(DOCS, STAGED, ignore=shutil.ignore_patterns("tools", "*.ipynb", "__pycache__", ".*"))
    for notebook in sorted(DOCS.rglob("*.ipynb")):
        to_markdown(notebook, STAGED / notebook.parent.relative_to(DOCS))
    for page in sorted(STAGED.rglob("*.md")):
        folder = DOCS / page.parent.relative_to(STAGED)
        page.write_text(as_page(page.read_text(encoding="utf-8"), folder), encoding="utf-8")


def build() -> int:
    """Builds ``build/site`` from ``build/docs``. Prints what Zensical says, without its colours; returns its status."""
    command = [Path(sys.executable).parent / "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).partition("Traceback")[0].rstrip())
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="show the handbook on http://localhost:8000")
    options = parser.parse_args()
    stage()
    if options.serve:
        sys.exit(subprocess.run([Path(sys.executable).parent / "zensical", "serve"], cwd=ROOT).returncode)
    sys.exit(build())


if __name__ == "__main__":
    main()
