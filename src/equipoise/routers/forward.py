"""What the forward of a model was given that its routers do not see: which tokens are padding, and how many rows.

Whose forward is told is found once, at ``attach``; its hooks set it before each forward and clear it after.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["ForwardContext", "is_traced"]


class Calls(Protocol):
    """Who counts the router calls of a forward, and drops those of one that failed."""

    @property
    def num_calls(self) -> int: ...

    def forward_failed(self, num_calls: int) -> None: ...


class ForwardContext:
    """What the attached module's forward was given: padding and rows. Its hooks set it before and clear it after.

    A copy of the model carries inert copies of the hooks, so it never writes into the original's context.
    """

    def __init__(self, model: nn.Module, observer: Calls):
        self.model = model
        self.observer = observer
        # by forward under way, of the one around it: mask, why it is none, rows
        self.outer: list[tuple[Tensor | None, str | None, int]] = []
        self.num_calls = 0  # router calls before the outermost of them
        self.mask: Tensor | None = None
        self.sequence_ids: Tensor | None = None
        self.rows = 0
        self.given = False  # by Balance.token_mask: outranks what the forward was called with
        self.of_layers: dict[int, tuple[Tensor | None, Tensor | None]] = {}  # by Balance.token_mask(where=...)
        self.unclear: set[nn.Module] = set()  # with a mask for a decoder too, whose routers nobody else tells theirs
        self.no_padding: str | None = None  # why the mask that the model was called with cannot be one of padding
        self.looked = False  # at a mask of floats that is not on the host

    def listen(self, routers: set[nn.Module]) -> list[RemovableHandle]:
        """Hooks into the forwards that are given the padding of ``routers``."""
        hooked = _hooked(self.model, routers)
        self.unclear = {module for module in hooked if _is_unclear(module, hooked, routers)}
        handles = []
        for module in hooked:
            names = _argument_names(module)
            handles += [
                module.register_forward_pre_hook(_Hook(self.before, names), with_kwargs=True),
                module.register_forward_hook(_Hook(self.after, names), always_call=True),
            ]
        return handles

    @property
    def told(self) -> bool:
        """Whether Balance.token_mask was called for this micro-batch."""
        return self.given or bool(self.of_layers)

    def clear(self) -> None:
        self.mask, self.sequence_ids, self.rows, self.given, self.of_layers = None, None, 0, False, {}
        self.no_padding = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Puts aside what belongs to the open micro-batch; what is said meanwhile ends with it."""
        held = self.mask, self.sequence_ids, self.rows, self.given, self.of_layers, self.no_padding
        self.clear()
        try:
            yield
        finally:
            self.mask, self.sequence_ids, self.rows, self.given, self.of_layers, self.no_padding = held

    def before(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(names, args, strict=False))
        named.update(kwargs)
        if module is self.model:
            if self.outer and not torch.compiler.is_compiling():  # one was interrupted, by Ctrl-C: no hook came after
                self.observer.forward_failed(self.num_calls)
            self.outer = []
        if not self.outer and not torch.compiler.is_compiling():
            self.num_calls = self.observer.num_calls
        self.outer.append((None if self.given else self.mask, self.no_padding, self.rows))
        rows = 0
        for name in ("input_ids", "inputs_embeds", *named):
            value = named.get(name)
            if isinstance(value, Tensor) and (value.dim() >= 3 or (value.dim() == 2 and not value.is_floating_point())):
                rows = value.shape[0]
                break
        self.rows = rows or self.rows
        mask = named.get("attention_mask")
        if not self.given and isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask, self.no_padding = mask, None
            tokens = next((v for v in (named.get("input_ids"), named.get("inputs_embeds")) if v is not None), None)
            length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() >= 2 else 0
            if mask.shape[0] == mask.shape[1] == length != rows:
                self.mask = None  # who may attend to whom
            elif _has_cache(named) and mask.shape[0] == rows and mask.shape[1] > length > 0:
                self.mask = mask[:, mask.shape[1] - length :]
            if self.mask is not None and not is_traced():
                self.no_padding = self._no_padding(mask, rows, module, named)

    def _no_padding(self, mask: Tensor, rows: int, module: nn.Module, named: dict[str, Any]) -> str | None:
        """Why a mask that a model was called with cannot be one of padding, as far as a host can see without waiting
        for a GPU; it waits once, for a mask of floats."""
        if module in self.unclear and isinstance(named.get("decoder_attention_mask"), Tensor):
            return "there is a decoder_attention_mask beside it, and nothing says which of them a router has"
        if type(mask) is not Tensor or mask.dtype == torch.bool:  # a fake one has no numbers
            return None
        if mask.device.type != "cpu" and (self.looked or not mask.is_floating_point() or mask.device.type == "meta"):
            return None
        self.looked = self.looked or mask.device.type != "cpu"
        if ((mask != 0) & (mask != 1) if mask.is_floating_point() else mask < 0).any():
            return "it holds other numbers, as masks that are added to attention scores do"
        if mask.shape[0] == mask.shape[1] == rows > 1 and torch.equal(mask != 0, torch.ones_like(mask != 0).tril()):
            return "it is that of causal attention, who may attend to whom"
        return None

    def after(self, names: list[str], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mask, self.no_padding, self.rows = self.outer.pop() if self.outer else (None, None, 0)
        if not self.given:
            self.mask = mask
        if self.outer:
            return
        if output is None and not torch.compiler.is_compiling() and sys.exc_info()[1] is not None:
            self.observer.forward_failed(self.num_calls)


def _has_cache(named: dict[str, Any]) -> bool:
    """Whether a forward goes on from earlier tokens, which a mask covers too."""
    found = (value for name, value in named.items() if "past" in name or "cache" in name)
    return any(value is not None and not isinstance(value, bool) for value in found)


class _Hook:
    """A method of a context as a module hook; a copy or a pickle of it does nothing."""

    def __init__(self, method: Any = None, names: list[str] | None = None):
        self.method, self.names = method, names

    def __call__(self, *args: Any) -> None:
        if self.method is not None:
            self.method(self.names, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _hooked(model: nn.Module, routers: set[nn.Module]) -> list[nn.Module]:
    """Whose forward is given the padding: the model, and whole models inside, which may be called by themselves. Where
    the model itself is a wrapper that takes none, the first in it that does, on the way to all its routers."""
    found = [model]
    within = model
    while "attention_mask" not in _argument_names(within):
        within = next((m for m in within.children() if routers and routers <= {*m.modules()} - {m}), model)
        if within is model:
            break
        if "attention_mask" in _argument_names(within):
            found.append(within)
    for module in model.modules():
        whole = {"input_ids", "attention_mask"} <= {*_argument_names(module)}
        if module not in found and whole and routers & {*module.modules()}:
            found.append(module)
    return found


def _is_unclear(module: nn.Module, hooked: Sequence[nn.Module], routers: set[nn.Module]) -> bool:
    """Whether it takes masks for an encoder and a decoder, and nothing inside tells some router which is its own."""
    within = {*module.modules()}
    told: set[nn.Module] = set()
    for one in hooked:
        if one is not module and one in within and "decoder_attention_mask" not in _argument_names(one):
            told.update(one.modules())
    takes_both = {"attention_mask", "decoder_attention_mask"} <= {*_argument_names(module)}
    return takes_both and any(router in within and router not in told for router in routers)


def _argument_names(module: nn.Module) -> list[str]:
    """Of its forward: looked up once for all modules of a class, of which some have a forward of their own."""
    if "forward" in module.__dict__:
        return list(inspect.signature(module.forward).parameters)
    return _parameters(type(module).forward)[1:]


@cache
def _parameters(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)


def is_traced() -> bool:
    """Whether somebody records this forward, or runs it by other rules."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
