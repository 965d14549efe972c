"""Single damages of a JSON file or a log, enumerated: what a disk, an editor or a stranger may leave there."""

import copy
import json
from collections.abc import Iterator
from typing import Any

REPLACEMENTS = (None, "x", [], {}, -1, 10**30, True, [[["a"]]], 0.5)


def mutations(content: bytes, *, is_log: bool, every: int = 1) -> Iterator[tuple[str, bytes | None]]:
    """What was done, and the new content: None for a removed file. Of the changes of single values every nth."""
    yield "removed", None
    yield "empty", b""
    yield "half", content[: len(content) // 2]
    yield "not UTF-8", content[:40] + b"\xff" + content[41:]
    yield "a pickle", b"\x80\x04\x95"
    yield "nested deeply", b"[" * 100_000
    yield "NaN", b"NaN\n"
    yield "half a surrogate pair", content.replace(b'{"', b'{"\\ud800": 1, "', 1)
    lines = content.splitlines(keepends=True) if is_log else [content]
    if is_log:
        yield "a line twice", lines[0] + content
        yield "a line less", b"".join(lines[:-1])
        yield "lines in another order", b"".join(lines[::-1])
    number = 0
    for row in sorted({0, len(lines) - 1}):
        value = json.loads(lines[row])
        for path in _paths(value):
            for change in ("deleted", *REPLACEMENTS):
                if change == "deleted" and not path:
                    continue
                number += 1
                if number % every == 0:
                    changed = json.dumps(_changed(value, path, change)).encode() + b"\n"
                    yield f"line {row + 1}, {path}: {change!r}", b"".join([*lines[:row], changed, *lines[row + 1 :]])


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every dict entry, and the first and last entry of every list."""
    yield path
    keys = list(value) if isinstance(value, dict) else sorted({0, len(value) - 1}) if isinstance(value, list) else []
    for key in keys if value else ():
        yield from _paths(value[key], (*path, key))


def _changed(value: Any, path: tuple, change: Any) -> Any:
    if not path:
        return change
    value = parent = copy.deepcopy(value)
    for key in path[:-1]:
        parent = parent[key]
    if change == "deleted":
        del parent[path[-1]]
    else:
        parent[path[-1]] = change
    return value
