"""What the model's forward was called with and its routers do not see: which tokens are padding, and how many rows.

``attach`` decides once which modules to hook. Their hooks set the context before each forward and restore it after.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise._text import shape_or_type
from equipoise.torch_internals import is_traced


class CallCounter(Protocol):
    """Counts the router calls of a forward, and drops those of a forward that failed."""

    @property
    def num_calls(self) -> int: ...
    def forward_failed(self, num_calls: int) -> None: ...


class TokenMask(NamedTuple):
    """Which tokens count, and which sequence each is in; None: all count, sequences are rows."""

    mask: Tensor | None = None
    sequence_ids: Tensor | None = None

    def check(self) -> None:
        """Raises ``ValueError`` for tensors that cannot say this."""
        for name, value in (("mask", self.mask), ("sequence_ids", self.sequence_ids)):
            if value is not None and (not isinstance(value, Tensor) or value.dim() not in (1, 2)):
                raise ValueError(f"{name} must be a tensor [batch, sequence] or [tokens]: got {shape_or_type(value)}.")
        if self.mask is not None and self.mask.device.type == "cpu" and ((self.mask != 0) & (self.mask != 1)).any():
            raise ValueError(
                "mask must hold 1 for a token that counts and 0 for padding: got other values. Labels, and masks that "
                "are added to attention scores, are not masks of tokens."
            )


class _Forward(NamedTuple):  # the context around a forward that is under way: to be restored after it
    mask: Tensor | None
    not_padding: str | None
    rows: int


class ForwardContext:
    """Padding and rows of the forward that is under way.

    A copy of the model carries inert copies of the hooks, so it never writes into the context of the original.
    """

    def __init__(self, model: nn.Module, counter: CallCounter):
        self.model = model
        self.counter = counter
        self.clear()
        self._forwards: list[_Forward] = []  # by forward under way, the context around it
        self._num_calls_before = 0  # router calls before the outermost forward
        self._num_calls_at_mask = 0  # router calls when token_mask was called
        self._ambiguous: set[nn.Module] = set()  # modules with two masks that cannot be assigned to their routers
        self._has_checked_values = False  # of a mask of floats that is not on the host

    def clear(self) -> None:
        self.mask: Tensor | None = None  # of padding, from Balance.token_mask or from the arguments of the forward
        self.sequence_ids: Tensor | None = None  # from Balance.token_mask
        self.rows = 0  # of the batch; 0 if unknown
        self.is_explicit = False  # the mask is from Balance.token_mask, which outranks the arguments of the forward
        self.masks_by_layer: dict[int, TokenMask] = {}  # by layer, what Balance.token_mask(where=...) set
        self.not_padding: str | None = None  # why the mask that the model was called with cannot be a padding mask

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Puts aside what belongs to the open micro-batch; what is set meanwhile ends with it."""
        names = ("mask", "sequence_ids", "rows", "is_explicit", "masks_by_layer", "not_padding")
        before = {name: getattr(self, name) for name in names}
        self.clear()
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    # ---- what Balance.token_mask says ----

    def set_mask(self, token_mask: TokenMask, layers: Sequence[int] | None = None) -> None:
        """Sets the mask of the coming micro-batch: for some layers, or for all that have none of their own."""
        if layers is None:
            self.mask, self.sequence_ids = token_mask
            self.is_explicit = True
        else:
            self.masks_by_layer |= dict.fromkeys(layers, token_mask)
        self._num_calls_at_mask = self.counter.num_calls

    @property
    def has_explicit_mask(self) -> bool:
        """Whether ``Balance.token_mask`` was called for this micro-batch."""
        return self.is_explicit or bool(self.masks_by_layer)

    @property
    def has_unused_mask(self) -> bool:
        """Whether ``Balance.token_mask`` was called and no forward came after it. In evaluation nothing is counted."""
        is_counted = self.has_explicit_mask and self.model.training
        return is_counted and self.counter.num_calls == self._num_calls_at_mask

    # ---- what a forward is called with ----

    def listen(self, routers: set[nn.Module]) -> list[RemovableHandle]:
        """Hooks into the forwards that know the padding of ``routers``."""
        modules = _modules_to_hook(self.model, routers)
        self._ambiguous = {module for module in modules if _is_ambiguous(module, modules, routers)}
        handles = []
        for module in modules:
            names = _argument_names(module)
            handles += [
                module.register_forward_pre_hook(_Hook(self._before, names), with_kwargs=True),
                module.register_forward_hook(_Hook(self._after, names), always_call=True),
            ]
        return handles

    def _before(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if module is self.model:
            if self._forwards and not torch.compiler.is_compiling():
                self.counter.forward_failed(self._num_calls_before)  # Ctrl-C ended a forward without its hook
            self._forwards = []
        if not self._forwards and not torch.compiler.is_compiling():
            self._num_calls_before = self.counter.num_calls
        self._forwards.append(_Forward(None if self.is_explicit else self.mask, self.not_padding, self.rows))
        rows = _num_rows(arguments)
        self.rows = rows or self.rows
        mask = arguments.get("attention_mask")
        if not self.is_explicit and isinstance(mask, Tensor) and mask.dim() == 2:
            length = _sequence_length(arguments)
            self.mask, self.not_padding = mask, None
            if mask.shape[0] == mask.shape[1] == length != rows:
                self.mask = None  # says who may attend to whom
            elif _has_cache(arguments) and mask.shape[0] == rows and mask.shape[1] > length > 0:
                self.mask = mask[:, mask.shape[1] - length :]
            if self.mask is not None and not is_traced():
                self.not_padding = self._why_not_padding(mask, rows, module, arguments)

    def _why_not_padding(self, mask: Tensor, rows: int, module: nn.Module, arguments: Mapping[str, Any]) -> str | None:
        """As far as the host can see without waiting for a GPU. It waits once: for the first mask of floats."""
        if module in self._ambiguous and isinstance(arguments.get("decoder_attention_mask"), Tensor):
            return "there is a decoder_attention_mask beside it, and nothing says which of them a router has"
        if type(mask) is not Tensor or mask.dtype == torch.bool:  # a fake tensor has no values
            return None
        on_host = mask.device.type == "cpu"
        if not on_host and (self._has_checked_values or not mask.is_floating_point() or mask.device.type == "meta"):
            return None
        self._has_checked_values = self._has_checked_values or not on_host
        if ((mask != 0) & (mask != 1) if mask.is_floating_point() else mask < 0).any():
            return "it holds other numbers, as masks that are added to attention scores do"
        if mask.shape[0] == mask.shape[1] == rows > 1 and torch.equal(mask != 0, torch.ones_like(mask != 0).tril()):
            return "it is a causal attention mask, which says who may attend to whom"
        return None

    def _after(self, names: list[str], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        around = self._forwards.pop() if self._forwards else _Forward(None, None, 0)
        self.not_padding, self.rows = around.not_padding, around.rows
        if not self.is_explicit:
            self.mask = around.mask
        is_outermost = not self._forwards and not torch.compiler.is_compiling()
        if is_outermost and output is None and sys.exc_info()[1] is not None:
            self.counter.forward_failed(self._num_calls_before)


class _Hook:
    """A module hook. A copy or a pickle of it does nothing."""

    def __init__(self, method: Any = None, names: list[str] | None = None):
        self.method, self.names = method, names

    def __call__(self, *args: Any) -> None:
        if self.method is not None:
            self.method(self.names, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


# ---- reading the arguments of a forward ----


def _num_rows(arguments: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", *arguments):
        value = arguments.get(name)
        if isinstance(value, Tensor) and (value.dim() >= 3 or (value.dim() == 2 and not value.is_floating_point())):
            return value.shape[0]
    return 0


def _sequence_length(arguments: Mapping[str, Any]) -> int:
    inputs = (arguments.get("input_ids"), arguments.get("inputs_embeds"))
    tokens = next((value for value in inputs if value is not None), None)
    return tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() >= 2 else 0


def _has_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward goes on from earlier tokens, which a mask covers too."""
    caches = (value for name, value in arguments.items() if "past" in name or "cache" in name)
    return any(value is not None and not isinstance(value, bool) for value in caches)


# ---- which modules to hook ----


def _modules_to_hook(model: nn.Module, routers: set[nn.Module]) -> list[nn.Module]:
    """The model, and whole models inside it, which may be called by themselves.

    If the model is a wrapper that takes no mask: also the first module in it that does, on the way to all routers.
    """
    modules = [model]
    inner = model
    while "attention_mask" not in _argument_names(inner):
        inner = next((m for m in inner.children() if routers and routers <= {*m.modules()} - {m}), model)
        if inner is model:
            break
        if "attention_mask" in _argument_names(inner):
            modules.append(inner)
    for module in model.modules():
        is_whole_model = {"input_ids", "attention_mask"} <= {*_argument_names(module)}
        if module not in modules and is_whole_model and routers & {*module.modules()}:
            modules.append(module)
    return modules


def _is_ambiguous(module: nn.Module, hooked: Sequence[nn.Module], routers: set[nn.Module]) -> bool:
    """Whether it takes masks for an encoder and a decoder, and no module inside says which of them a router has."""
    inside = {*module.modules()}
    with_own_mask: set[nn.Module] = set()
    for other in hooked:
        if other is not module and other in inside and "decoder_attention_mask" not in _argument_names(other):
            with_own_mask.update(other.modules())
    takes_both = {"attention_mask", "decoder_attention_mask"} <= {*_argument_names(module)}
    return takes_both and any(router in inside and router not in with_own_mask for router in routers)


def _argument_names(module: nn.Module) -> list[str]:
    """Of its forward. Looked up once for all modules of a class, except for those with a forward on the instance."""
    if "forward" in module.__dict__:
        return list(inspect.signature(module.forward).parameters)
    return _parameter_names(type(module).forward)[1:]


@cache
def _parameter_names(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)
