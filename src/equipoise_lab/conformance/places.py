"""Where the code of a wrong answer stands, and who wrote about it: ``places/FRAMEWORK.toml``."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Place", "places_of"]

FOLDER = Path(__file__).parent / "places"


@dataclass(frozen=True)
class Place:
    """About one wrong answer of one framework.

    Attributes:
        file: the file and line in the newest release that was run: ``router.py:528``.
        thread: the public issue or pull request, ``NVIDIA/Megatron-LM#3672``; empty if we know none.
        note: how it comes about, or where the framework is right, in a sentence or two.
    """

    file: str
    thread: str = ""
    note: str = ""


def places_of(framework: str) -> dict[str, Place]:
    """The places by scenario. Raises ``TypeError`` for a key that ``Place`` does not have."""
    path = FOLDER / f"{framework}.toml"
    if not path.exists():
        return {}
    return {scenario: Place(**entry) for scenario, entry in tomllib.loads(path.read_text(encoding="utf-8")).items()}
