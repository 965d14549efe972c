"""Tells whether two routers are alike, so that what was proven of one holds for the other."""

import logging
from collections import deque
from collections.abc import Mapping, Sized
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from equipoise.routers.kind import ADDED_SLOT
from equipoise.routers.logits import LOGITS
from equipoise.routers.shapes import whole_shape
from equipoise.routers.tapped import plain_class

_SKIPPED = vars(nn.Module()).keys() - {"training"} | {"_equipoise", "_equipoise_held", LOGITS}
_MAX_OBJECTS = 4000  # in a router; above, it is proven individually


class NotComparable(Exception):
    """A router holds state that cannot be fingerprinted."""


def fingerprint(router: nn.Module) -> Any:
    """All that a router's forward may depend on: classes, attributes and the shapes of tensors, of it and inside it.

    Equal and hashable for routers that are alike; keeps no tensor and no module alive. Raises ``NotComparable``.
    """
    seen: dict[int, tuple[int, Any]] = {}
    parts = []
    for path, module in router.named_modules():
        base = plain_class(module)
        attributes = {name: value for name, value in vars(module).items() if name not in _SKIPPED}
        parts.append((path, base, base.forward, _value(attributes, seen), tensor_shapes(module)))
    return tuple(parts)


def tensor_shapes(module: nn.Module | None) -> tuple[Any, ...]:
    """Names and shapes of a module's own parameters and buffers, and which hold floating-point numbers."""
    if module is None:
        return ()
    tensors = {**module._buffers, **module._parameters}
    present = ((name, tensor) for name, tensor in tensors.items() if tensor is not None and name != ADDED_SLOT)
    return tuple((name, tuple(whole_shape(tensor)), tensor.is_floating_point()) for name, tensor in present)


def _value(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """Equal for values that a forward cannot tell apart.

    ``seen`` holds every object that was visited: without a reference its address could be another object's later.
    """
    if value is None or isinstance(value, int | float | str | bytes | type | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, ModuleType | logging.Logger):
        return type(value), value.__name__ if isinstance(value, ModuleType) else value.name
    if id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value
    if len(seen) > _MAX_OBJECTS or (isinstance(value, Sized) and len(value) > _MAX_OBJECTS):
        raise NotComparable
    if isinstance(value, Mapping):
        return type(value), tuple((_value(k, seen), _value(v, seen)) for k, v in value.items())
    if isinstance(value, list | tuple | deque):
        return type(value), tuple(_value(item, seen) for item in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_value(item, seen) for item in value)
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, nn.Module | torch.Tensor):
        return value
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, _value([cells, value.__defaults__, value.__kwdefaults__], seen)
    if isinstance(value, MethodType):
        return _value([value.__func__, value.__self__], seen)
    if isinstance(value, partial):
        return _value([value.func, value.args, value.keywords], seen)
    if isinstance(value, nn.Module | torch.Tensor) or not hasattr(value, "__dict__"):
        raise NotComparable
    return type(value), _value(vars(value), seen)
