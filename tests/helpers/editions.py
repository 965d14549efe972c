"""Editions for tests: one whose pages take claims of any name, and one made of files."""

from dataclasses import replace
from pathlib import Path

from equipoise_lab.reproduce.edition import Edition, load_edition

__all__ = ["any_claim", "copy_of_first"]


def any_claim() -> Edition:
    """The first edition, with pages that take claims of any other name as claims about mechanisms."""
    first = load_edition("first")
    others = list("abcdefghijklmnopqrstuvwxyz")
    mechanisms = {**first.page.parts["mechanisms"], "claims": [*first.page.parts["mechanisms"]["claims"], *others]}
    return replace(first, page=replace(first.page, parts={**first.page.parts, "mechanisms": mechanisms}))


def copy_of_first(folder: Path) -> None:
    """Writes a small edition with the sizes, frontiers and pages of the first and its claim 1-scope."""
    source = Path(__file__).parents[2] / "src" / "equipoise_lab" / "reproduce" / "editions" / "first"
    for name in ("sizes.toml", "frontiers.toml", "page.toml", "claims/1-scope.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
