"""Parts of pages that a program writes, between markers: ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

Every page that has such parts has a tool here, ``python docs/tools/NAME_page.py``. With ``--check`` it writes nothing
and exits with 1 if the page is out of date.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from equipoise.errors import UsageError

__all__ = ["REFERENCE", "main", "table", "update"]

REFERENCE = Path(__file__).parents[1] / "reference"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. A cell may hold any text without a line break."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def update(text: str, parts: Mapping[str, str]) -> str:
    """The text of a page with what stands between its markers replaced. ``parts``: by the name of their marker."""
    for name, part in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise UsageError(f"The page must hold {start} and {end} once each. Put the markers back.")
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{part}\n\n{end}{rest.split(end)[1]}"
    return text


def main(page: Path, parts: Mapping[str, str], arguments: Sequence[str] | None = None) -> None:
    """Writes the parts into the page; with ``--check`` it only compares."""
    parser = argparse.ArgumentParser(description=f"Writes the generated parts of {page.name}.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    before = page.read_text(encoding="utf-8")
    after = update(before, parts)
    if not parser.parse_args(arguments).check:
        page.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit(f"{page.name} is out of date. Run: python docs/tools/{Path(sys.argv[0]).name}")
