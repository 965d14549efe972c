"""What the callback puts on a model: forward hooks, and a ``save_pretrained`` that saves more.

Both turn into harmless stand-ins when the model is copied or pickled: a copy does not report to the callback.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["ForwardHook", "unwrap_save_pretrained", "wrap_save_pretrained"]


class ForwardHook:
    """Calls ``function`` as a hook of a forward. A copy of the hook does nothing."""

    def __init__(self, function: Callable[..., Any] | None = None):
        self.function = function

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHook, ()


def wrap_save_pretrained(model: Any, after_save: Callable[[Path], None]) -> None:
    """Lets ``model.save_pretrained(folder)`` call ``after_save(folder)`` on the main process."""
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = _SavePretrained(model, after_save)


def unwrap_save_pretrained(model: Any) -> None:
    """Undoes ``wrap_save_pretrained``."""
    model.__dict__.pop("save_pretrained", None)


class _SavePretrained:
    """``save_pretrained`` of one model, with ``after_save`` behind it. A copy only calls the original."""

    def __init__(self, model: Any, after_save: Callable[[Path], None] | None = None):
        self.model, self.after_save = model, after_save

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        original = type(self.model).save_pretrained
        result = original(self.model, save_directory, *args, **kwargs)
        arguments = inspect.signature(original).bind(self.model, save_directory, *args, **kwargs).arguments
        if self.after_save is not None and arguments.get("is_main_process", True):
            self.after_save(Path(save_directory))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _SavePretrained, (self.model,)
