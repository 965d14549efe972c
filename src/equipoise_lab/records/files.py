"""Reads JSON that may be damaged or hostile, and writes it atomically. Every error names the file."""

import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from equipoise.errors import EquipoiseError

__all__ = [
    "check",
    "finite",
    "open_record",
    "parse",
    "read_at_most",
    "read_json",
    "require_keys",
    "write_json",
    "write_parts",
]

MAX_BYTES = 2**28  # of a JSON file or a line: hundreds of times more than a run of hundreds of layers writes


def finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite, which JSON cannot represent.

    >>> finite({"loss": float("nan"), "load": [1, 2]})
    {'loss': None, 'load': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically: ``path`` has either the old content or the new one, whatever happens."""
    text = json.dumps(finite(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_parts(path, [text.encode()])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a link there would lead to another file
    with open(temporary, "xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path, schema: Any = None) -> Any:
    """The content of a JSON file, which must fit ``schema``. Every problem is an ``EquipoiseError`` with the path."""
    try:
        with open_record(path) as file:
            content = parse(read_at_most(file, path))
    except FileNotFoundError:
        raise EquipoiseError(
            f"A run folder must contain {path.name}: {path} does not exist. Either the run was stopped before it "
            "started, or this is no run folder. Train again into a new folder."
        ) from None
    except ValueError as error:
        raise EquipoiseError(
            f"{path} must be JSON: {error}. The file is damaged. Restore it, or create it again (a run: remove its "
            "folder and train; an audit: repeat the same `equipoise audit`)."
        ) from None
    if schema is not None:
        check(str(path), content, schema)
    return content


def check(where: str, content: Any, schema: Any) -> None:
    """Raises ``EquipoiseError``, which names ``where`` and the first value that does not fit ``schema``."""
    try:
        _adapter(schema).validate_python(content)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        name = ".".join(map(str, error["loc"]))
        problem = f"{error['msg'][0].lower()}{error['msg'][1:]}, got {reprlib.repr(error['input'])}"
        if error["type"] == "missing":
            raise _missing(where, [name]) from None
        raise EquipoiseError(
            f"{where} must contain {name or 'a record'} in the right form: {problem}. The file is damaged or of "
            "another version; restore it or make it again."
        ) from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def require_keys(where: str, content: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises ``EquipoiseError`` unless ``content``, which ``where`` names, has all ``keys``."""
    if missing := [key for key in keys if key not in content]:
        raise _missing(where, missing)


def _missing(where: str, names: list[str]) -> EquipoiseError:
    return EquipoiseError(
        f"{where} must contain {', '.join(names)}: it does not. The file is damaged or of another version; restore it "
        "or make it again."
    )


def open_record(path: Path) -> BinaryIO:
    """Raises FileNotFoundError if there is nothing, and EquipoiseError if it cannot be read."""
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise EquipoiseError(f"A record must be a file: {path} is none. Remove it, or restore the file.")
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EquipoiseError(f"A record must be readable: {path}: {error.strerror}. Check its permissions.") from None


def read_at_most(file: BinaryIO, path: Path, line: bool = False) -> bytes:
    content = file.readline(MAX_BYTES + 1) if line else file.read(min(MAX_BYTES, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > MAX_BYTES:
        raise EquipoiseError(
            f"{'A line of ' if line else ''}{path} must have at most {MAX_BYTES:,} bytes: it has more. It is no record "
            "of a run. Restore the file, or remove the folder."
        )
    return content


def parse(content: bytes) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\u" in content:  # it may be half a surrogate pair, which no page can show
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
