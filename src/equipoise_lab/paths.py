"""Paths that a user passes: which one was meant, and whether a folder can be written. Imports no torch."""

import difflib
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from equipoise.errors import EquipoiseError

__all__ = ["check_writable", "some_names", "suggest_paths"]


def suggest_paths(path: Path, others: Iterable[str] = ()) -> str:
    """For the error of a path that does not exist: a question that names what is near, "" if nothing is.

    Near are entries of the deepest folder of ``path`` that exists, and ``others``.

    >>> suggest_paths(Path("packaged_korpus"), ["packaged_corpus"])
    ' Did you mean packaged_corpus?'
    """
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    try:
        names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    near = difflib.get_close_matches(str(path), list(others), n=1)
    for name in difflib.get_close_matches(missing.name, names, n=3):
        beside = missing.parent / name
        inside = beside / path.relative_to(missing)
        near.append(str(inside if inside.exists() else beside))
    return f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""


def some_names(folder: Path) -> str:
    """For an error: the first three names in ``folder``, and how many more there are."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_writable(folder: Path, option: str) -> None:
    """Raises ``EquipoiseError``, which names ``option``, unless files can be made in ``folder``, which may be missing.

    It makes the folder and a file without a name, and leaves nothing.
    """
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            if path.is_dir():
                continue
            if path.exists():
                raise EquipoiseError(
                    f"{option} must be a folder that can be written: {path} is a file. Choose another folder."
                )
            path.mkdir(exist_ok=True)
            made.append(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EquipoiseError(
            f"{option} must be a folder that can be written: {folder}: {error.strerror}. Choose another."
        ) from None
    finally:
        for path in reversed(made):
            with suppress(OSError):  # another process may have written into it
                path.rmdir()
