"""What an import of a framework says if the framework is missing, or of a version that lacks what is needed."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["explained"]


@contextmanager
def explained(name: str, package: str, distribution: str, version: str) -> Iterator[None]:
    """Raises ``ImportError`` with what to install, where an import of ``package`` fails inside.

    ``name``: what needs it. ``distribution`` and ``version``: what pip installs, and the oldest that has all.
    """
    try:
        yield
    except ImportError as error:
        missing = error.name or package
        if missing.partition(".")[0] == "equipoise":
            raise
        if missing == package or not missing.startswith(f"{package}."):
            raise ImportError(f"{name} needs {missing}, which is not installed: pip install {distribution}.") from error
        raise ImportError(
            f"{name} needs {distribution} {version} or newer: the one that is installed lacks a part of {missing} "
            f"({error})."
        ) from error
