"""The arguments that a callback hands on to ``equipoise.attach``."""

import inspect
from collections.abc import Iterable

from equipoise.attachment import attach

__all__ = ["check_attach_arguments"]


def check_attach_arguments(callback: str, names: Iterable[str]) -> None:
    """Raises ``TypeError`` for a name that is not a keyword of ``attach``. Else only the training would find it."""
    keywords = [name for name, p in inspect.signature(attach).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in names:
        if name not in keywords:
            raise TypeError(
                f"an argument of {callback} must be one of attach ({', '.join(keywords)}): got {name}. Options of a "
                "strategy belong into its string, as in 'loss-free:rate=1e-3'."
            )
