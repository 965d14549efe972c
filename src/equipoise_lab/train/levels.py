"""Groups of domains at several levels: by script, detected in the text, and by language or more, read from a file.

Experts that separate Chinese from Latin letters have learnt a script, not a subject. So the levels are reported
separately.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from equipoise.errors import UsageError
from equipoise_lab.train.location import local_path
from equipoise_lab.train.text_files import LEVELS_FILE

__all__ = ["levels_of", "script_of"]

SAMPLE_LENGTH = 20_000  # characters of a domain in which the script is detected
NAMES = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


def script_of(text: str) -> str:
    """The script of most letters in a text, or "none".

    >>> script_of("Marseille, le 3 mai"), script_of("床前明月光"), script_of("12 + 3"), script_of("москва")
    ('Latin', 'Han', 'none', 'Cyrillic')
    """
    names = (unicodedata.name(c, "?").split()[0] for c in text[:SAMPLE_LENGTH] if c.isalpha())
    scripts = Counter(NAMES.get(name, name.capitalize()) for name in names)
    return scripts.most_common(1)[0][0] if scripts else "none"


def levels_of(data: str | Path | None, texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Labels of the domains by level, coarse levels first. ``texts`` holds a sample of each domain and sets the order.

    The first level is ``script``. Further levels come from ``levels.json`` in the text's folder; the packaged corpus
    has one. Its form is ``{"language": {"law_fr": "French", ...}}``: coarse levels first, each with a label for every
    domain. A level that gives all domains the same label, or all different ones, is left out: it groups nothing.
    """
    levels = {"script": [script_of(text) for text in texts.values()]}
    path = local_path(data) / LEVELS_FILE
    if path.is_file():
        levels |= _read(path, list(texts))
    return {level: labels for level, labels in levels.items() if 1 < len(set(labels)) < len(labels)}


def _read(path: Path, domains: list[str]) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "domain" in content:
            raise ValueError('no level may be called "domain": the domains themselves are the last level')
        return {str(level): [str(labels[domain]) for domain in domains] for level, labels in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f'{path} must be JSON like {{"language": {{"law_fr": "French"}}}}, with a label for every domain at every '
            f"level: {type(error).__name__}: {error}. Correct the file, or remove it."
        ) from None
