"""Writes and checks the parts of the README that come from stored results, each between two marks."""

import re
from pathlib import Path

__all__ = ["check", "replace"]

README = Path(__file__).parent.parent / "README.md"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", re.DOTALL)


def replace(name: str, text: str) -> None:
    """Puts ``text`` between the marks of ``name``."""
    README.write_text(_pattern(name).sub(lambda match: match.group(1) + text + match.group(2), README.read_text()))


def check(name: str, text: str) -> bool:
    """Whether ``text`` stands between the marks of ``name``."""
    match = _pattern(name).search(README.read_text())
    return match is not None and text in match.group(0)
