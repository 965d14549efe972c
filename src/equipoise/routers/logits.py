"""The logits of a router whose forward does not return them: kept where a part of it returns or takes them."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.routers.adapter import RouterAdapter

LOGITS = "_equipoise_logits"  # the attribute of a router that holds them during its forward


def methods_keeping_logits(base: Any, adapter: RouterAdapter) -> dict[str, Any]:
    """The methods of a subclass of ``base`` that keep the logits of the forward under way."""
    methods: dict[str, Any] = {LOGITS: None}
    by, to = adapter.logits_returned_by, adapter.logits_passed_to
    if by is not None and hasattr(base, by):
        methods[by] = _keep_what_it_returns(getattr(base, by))
    if to is not None:
        methods[to] = _keep_what_it_takes(getattr(base, to))
    return methods


def hook_keeping_logits(router: nn.Module, adapter: RouterAdapter) -> RemovableHandle | None:
    """A hook on the module inside ``router`` that returns its logits, if a module does."""
    child = _child(router, adapter.logits_returned_by)
    return None if child is None else child.register_forward_hook(_Hook(router))


def take_logits(router: nn.Module) -> Any:
    """The logits that the forward of a router kept; None if it kept none. The router forgets them."""
    logits = getattr(router, LOGITS, None)
    if logits is not None:
        setattr(router, LOGITS, None)
    return logits


class KeepingLogits:
    """Keeps the logits of the forwards of a router without a tap, while the block runs. ``value``: of the last one."""

    def __init__(self, router: nn.Module, adapter: RouterAdapter | None):
        self.router = router
        self.value: Tensor | None = None
        self.methods: list[tuple[nn.Module, str, Any]] = []  # a module, the name of its method, what wraps that
        if adapter is not None and adapter.logits_returned_by is not None:
            child = _child(router, adapter.logits_returned_by)
            place = (router, adapter.logits_returned_by) if child is None else (child, "forward")
            self.methods.append((*place, _keep_what_it_returns))
        if adapter is not None and adapter.logits_passed_to is not None:
            self.methods.append((router, adapter.logits_passed_to, _keep_what_it_takes))

    def __enter__(self) -> "KeepingLogits":
        self.before = [module.__dict__.get(name) for module, name, _ in self.methods]
        for module, name, wrap in self.methods:
            method = wrap(_without_self(getattr(module, name)))
            module.__dict__[name] = MethodType(method, self.router)
        return self

    def __exit__(self, *error: Any) -> None:
        self.value = take_logits(self.router)
        self.router.__dict__.pop(LOGITS, None)
        for (module, name, _), method in zip(self.methods, self.before, strict=True):
            if method is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = method


class _Hook:
    """A forward hook that keeps the output of a module as the logits of ``router``. A copy or pickle does nothing."""

    def __init__(self, router: nn.Module | None = None):
        self.router = router

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.router is not None:
            setattr(self.router, LOGITS, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _child(router: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else router._modules.get(name)


def _keep_what_it_returns(method: Callable[..., Any]) -> Callable[..., Any]:
    def returning(self, *args, **kwargs):
        logits = method(self, *args, **kwargs)
        setattr(self, LOGITS, logits)
        return logits

    return returning


def _keep_what_it_takes(method: Callable[..., Any]) -> Callable[..., Any]:
    def taking(self, logits, *args, **kwargs):
        setattr(self, LOGITS, logits)
        return method(self, logits, *args, **kwargs)

    return taking


def _without_self(bound: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: bound(*args, **kwargs)
