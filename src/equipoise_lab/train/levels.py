"""What domains have in common, by level: their script, seen in the text; language and more where a file says so.

Experts that split Chinese from Latin letters have learnt a script, not a subject: so the two are reported apart.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from equipoise.errors import UsageError
from equipoise_lab.train.text import CORPUS, LEVELS_FILE

__all__ = ["levels_of", "script_of"]

LOOKED_AT = 20_000  # characters of a domain
NAMES = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


def script_of(text: str) -> str:
    """The script that most letters of a text are of.

    >>> script_of("Marseille, le 3 mai"), script_of("床前明月光"), script_of("12 + 3"), script_of("москва")
    ('Latin', 'Han', 'none', 'Cyrillic')
    """
    names = (unicodedata.name(c, "?").split()[0] for c in text[:LOOKED_AT] if c.isalpha())
    scripts = Counter(NAMES.get(name, name.capitalize()) for name in names)
    return scripts.most_common(1)[0][0] if scripts else "none"


def levels_of(data: str | Path | None, texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Labels of domains by level, coarse ones first, in the order of ``texts``, which has some text of each.

    The first level is ``script``. Others come from ``levels.json`` in the folder of the text, as the packaged corpus
    has one: ``{"language": {"law_fr": "French", ...}}``, each level with a label for every domain, coarse ones first.
    A level at which all domains are alike, or all are different, says nothing and is left out.
    """
    found = {"script": [script_of(text) for text in texts.values()]}
    path = (CORPUS if data is None or data == "corpus" else Path(data).expanduser()) / LEVELS_FILE
    if path.is_file():
        found |= _read(path, list(texts))
    return {level: labels for level, labels in found.items() if 1 < len(set(labels)) < len(labels)}


def _read(path: Path, domains: list[str]) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "domain" in content:
            raise ValueError("no level may be called domain, which is the last of all")
        return {str(level): [str(labels[domain]) for domain in domains] for level, labels in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f'{path} must be JSON such as {{"language": {{"law_fr": "French"}}}} with a label for every domain at '
            f"every level: {type(error).__name__}: {error}. Mend it, or remove it."
        ) from None
