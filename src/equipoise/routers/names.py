"""The modules of a model by the names that they have in the plain model, whatever wraps it.

A wrapper runs one of its children in its own place: that child takes the wrapper's name. So biases that were trained
inside adapters or wrappers fit the plain model, and the other way round.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.optim.swa_utils import AveragedModel

from equipoise.torch_internals import WRAPPED

_WRAPPED_BY_PEFT = ("base_model", "model", "base_layer", "original_module")
_WRAPPERS_OF_MODULE = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


class NamedModule(NamedTuple):
    """A module that is not a wrapper."""

    name: str
    module: nn.Module
    parent: nn.Module | None  # the module around it that is not a wrapper


def named_modules(model: nn.Module) -> list[NamedModule]:
    """All modules in model order, each once. Left out: wrappers, what they add, the copies that they do not call."""
    return list(_walk(model, "", None, set()))


def _walk(module: nn.Module, name: str, parent: nn.Module | None, seen: set[nn.Module]) -> Iterator[NamedModule]:
    if module in seen:
        return
    seen.add(module)
    wrapped = _wrapped(module)
    if wrapped is not None:
        yield from _walk(wrapped, name, parent, seen)
        return
    plain_name = name
    while plain_name.startswith("module."):  # wrappers of other libraries around the whole model
        plain_name = plain_name.removeprefix("module.")
    yield NamedModule(plain_name, module, parent)
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, module, seen)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper runs in its own place; None if it is not a wrapper."""
    names: tuple[str, ...] = WRAPPED
    if isinstance(module, _WRAPPERS_OF_MODULE):
        names = ("module",)
    elif any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
        if (copies := module._modules.get("modules_to_save")) is not None:
            return _active_copy(module, copies)
        names = _WRAPPED_BY_PEFT
    children = (module._modules.get(name) for name in names)
    return next((child for child in children if child is not None), None)


def _active_copy(wrapper: Any, copies: Any) -> nn.Module:
    """Of the copies of a module that adapters train in full, the one that runs now; else the original."""
    adapters = wrapper.active_adapter
    adapters = [adapters] if isinstance(adapters, str) else adapters
    runs_copy = adapters and not wrapper.disable_adapters and all(adapter in copies for adapter in adapters)
    return copies[adapters[0]] if runs_copy else wrapper.original_module
