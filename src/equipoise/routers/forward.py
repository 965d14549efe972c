"""What the model's forward was called with and its routers do not see: padding, sequences, whether gradients are on.

``attach`` decides once which modules to hook. Their hooks set the context before each forward and restore it after.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise._text import shape_or_type
from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import RouterAdapter
from equipoise.routers.arguments import (
    PREDICTS_FURTHER,
    argument_names,
    changes,
    flat_tokens,
    has_cache,
    numbered,
    padding_argument,
    rows_and_length,
    sequence_length,
    sequence_starts,
)
from equipoise.torch_internals import (
    are_gradients_wanted,
    frame_above,
    is_backward_running,
    is_frame_running,
    is_traced,
)


class CallCounter(Protocol):
    """Counts the router calls of forwards."""

    @property
    def num_calls(self) -> int: ...
    def forward_failed(self, num_calls: int) -> None: ...  # drops what it counted after the first num_calls
    def forward_ended(self) -> None: ...  # a forward has routed all its tokens
    def forward_is_a_micro_batch(self) -> bool: ...  # no loss() separates micro-batches


_NOT_PADDING = (
    "an attention_mask of two dimensions must say which tokens are padding: of the one that the model was called with, "
    "{reason}. Say which tokens count before the forward: balance.token_mask(mask), token_mask(None) if all do, "
    "token_mask(mask, where=...) for some layers."
)


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


class _Inputs(NamedTuple):
    """What a forward was called with."""

    mask: Tensor | None = None  # of padding
    sequence_ids: Tensor | None = None  # numbers the sequences; None: sequences are rows
    rows: int = 0  # of the batch; 0 if unknown
    length: int = 0  # tokens of a row; 0 if unknown
    ids: Tensor | None = None  # the argument input_ids
    problem: str | None = None  # why its mask or its sequences cannot be used


class Shared(Protocol):
    """What the calls of a forward share."""

    def end(self) -> None: ...  # the forward has ended


class ForwardTokens:
    """One forward, as an object of its own: how many tokens each layer's calls in it have had, and what they share."""

    def __init__(self) -> None:
        self._by_layer: dict[int, int] = {}
        self._shared: dict[tuple[Any, ...], tuple[Tensor | None, Shared]] = {}

    def add(self, layer: int, num_tokens: int) -> int:
        """Adds those of a call. Returns how many came before it."""
        before = self._by_layer.get(layer, 0)
        self._by_layer[layer] = before + num_tokens
        return before

    def share(self, source: Tensor | None, how: tuple[Any, ...], make: Callable[[], Shared]) -> Any:
        """What ``make()`` gives, or gave to an earlier call with the same tensor and the same ``how``."""
        key = (id(source), *how)
        if key not in self._shared:
            self._shared[key] = source, make()  # the tensor is kept, so that no other gets its id
        return self._shared[key][1]

    def end(self) -> None:
        for _, shared in self._shared.values():
            shared.end()
        self._shared.clear()


class _Forward(NamedTuple):
    """A forward that is under way, and the context around it, which is restored after it."""

    module: nn.Module
    inputs: _Inputs
    has_gradient: bool | None
    tokens: "ForwardTokens"
    is_own: bool  # it does not run inside another one
    error: BaseException | None  # that was being handled when it began
    frame: FrameType | None  # that runs it; None while a graph is made
    thread: int = 0


class ForwardContext:
    """Padding, sequences and gradient mode of the forward that is under way.

    A copy of the model carries inert copies of the hooks, so it never writes into the context of the original.

    Attributes:
        inputs: what the innermost forward was called with.
        true_hides: True in a mask of queries and keys says that a token may not attend.
        token_mask: what ``Balance.token_mask`` said. It outranks ``inputs``.
        has_gradient: whether gradients were on when the outermost forward began. Inside, reentrant checkpointing
            switches them off. None if no forward is under way.
        reads_order: routing is recorded, and the order of the tokens of a router is to be known.
    """

    def __init__(
        self, model: nn.Module, counter: CallCounter, needs_sequences: bool, adapters: Sequence[RouterAdapter] = ()
    ):
        self.model = model
        self.counter = counter
        self.needs_sequences = needs_sequences
        self.true_hides = any(adapter.attention_mask_hides for adapter in adapters)
        self.clear()
        self.inputs = _Inputs()
        self.has_gradient: bool | None = None
        self.reads_order = False
        self._forwards: list[_Forward] = []  # under way, from the outermost to the innermost
        self._last = ForwardTokens()  # of the last outermost forward
        self._num_calls_before = 0  # router calls before the outermost forward
        self._num_calls_at_mask = 0  # router calls when token_mask was called
        self._ambiguous: set[nn.Module] = set()  # modules with two masks that cannot be assigned to their routers
        self._has_checked_values = False  # of a mask of floats that is not on the host
        by_torch = any(getattr(module, "batch_first", True) is False for module in model.modules())
        self._is_sequence_first = by_torch or any(adapter.is_sequence_first for adapter in adapters)

    def clear(self) -> None:
        self.token_mask: TokenMask | None = None
        self.masks_by_layer: dict[int, TokenMask] = {}  # by layer, what Balance.token_mask(where=...) set

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Puts aside what belongs to the open micro-batch; what is set meanwhile ends with it."""
        before = self.inputs, self.token_mask, self.masks_by_layer
        self.clear()
        self.inputs = _Inputs()
        try:
            yield
        finally:
            self.inputs, self.token_mask, self.masks_by_layer = before

    @property
    def is_under_way(self) -> bool:
        """Whether a forward runs. Not known in the graph of a compiled model, which holds the hooks too."""
        return bool(self._forwards)

    @property
    def outermost(self) -> ForwardTokens:
        """The outermost forward, or the last one: in a graph the hooks act before or after all calls."""
        return self._forwards[0].tokens if self._forwards else self._last

    @property
    def innermost(self) -> ForwardTokens:
        return self._forwards[-1].tokens if self._forwards else self._last

    # ---- what Balance.token_mask says ----

    def set_mask(self, token_mask: TokenMask, layers: Sequence[int] | None = None) -> None:
        """Sets the mask of the coming micro-batch: for some layers, or for all that have none of their own."""
        ids = token_mask.sequence_ids
        if ids is not None:
            token_mask = token_mask._replace(sequence_ids=numbered(changes(ids if ids.dim() == 2 else ids[None])))
        if layers is None:
            self.token_mask = token_mask
        else:
            self.masks_by_layer |= dict.fromkeys(layers, token_mask)
        self._num_calls_at_mask = self.counter.num_calls

    @property
    def has_explicit_mask(self) -> bool:
        """Whether ``Balance.token_mask`` was called for this micro-batch."""
        return self.token_mask is not None or bool(self.masks_by_layer)

    @property
    def uses_places(self) -> bool:
        """Whether it matters which of the forward's tokens a router call has."""
        inputs = self.inputs
        has_mask = inputs.mask is not None or self.has_explicit_mask
        return has_mask or self.needs_sequences

    def mask_and_sequences(self) -> tuple[Tensor | None, Tensor | None]:
        """For layers that have no mask of their own."""
        if self.token_mask is None:
            return self.inputs.mask, self.inputs.sequence_ids
        mask, sequence_ids = self.token_mask
        return mask, self.inputs.sequence_ids if sequence_ids is None else sequence_ids

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
            names = argument_names(module)
            handles += [
                module.register_forward_pre_hook(_Hook(self._before, names), with_kwargs=True),
                module.register_forward_hook(_Hook(self._after, names), always_call=True),
            ]
        return handles

    def _before(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._begin(module, None, None)
        else:
            self._drop_interrupted_forwards(module)
            self._begin(module, sys.exc_info()[1], frame_above(2))  # of the module's __call__, which runs its forward
        if len(self._forwards) == 1 or "attention_mask" in names:  # the hidden states of a part show no rows
            self._read(module, {**dict(zip(names, args, strict=False)), **kwargs})

    def _begin(self, module: nn.Module, error: BaseException | None, frame: FrameType | None) -> None:
        is_outermost = not self._forwards
        # A model that calls itself begins a forward of its own: generation inside a forward, recursive reasoning.
        is_own = is_outermost or (frame is not None and any(forward.module is module for forward in self._forwards))
        tokens = ForwardTokens() if is_own else self._forwards[-1].tokens
        thread = 0 if frame is None else threading.get_ident()
        forward = _Forward(module, self.inputs, self.has_gradient, tokens, is_own, error, frame, thread)
        self._forwards.append(forward)
        if is_own:
            self.has_gradient = are_gradients_wanted()
        if is_outermost:
            self._last = tokens
        if is_outermost and frame is not None:
            self._num_calls_before = self.counter.num_calls
            self._check_mask_is_new()

    def _drop_interrupted_forwards(self, module: nn.Module) -> None:
        """Ctrl-C ends a forward without its hook."""
        if not self._forwards or is_backward_running():
            return
        while self._forwards:
            forward = self._forwards[-1]
            # A compiled forward has no frame that could be looked for. It does not call itself.
            is_running = forward.module is not module
            if forward.frame:
                is_running = is_frame_running(forward.frame, forward.thread)
            if is_running:
                break
            self._end()
            if not self._forwards:
                self.counter.forward_failed(self._num_calls_before)
        if self._forwards and self._forwards[-1].thread not in (0, threading.get_ident()):
            raise EquipoiseError(
                "a forward must end before another thread begins one of the same model: two run at once, and each "
                "would count with the padding of the other. Give one of the threads a copy of the model."
            )

    def _check_mask_is_new(self) -> None:
        """Where every forward is a micro-batch, a mask is for one forward."""
        is_used = self.has_explicit_mask and self.counter.num_calls > self._num_calls_at_mask
        is_counted = self.model.training and self.has_gradient and not is_backward_running()
        if is_used and is_counted and self.counter.forward_is_a_micro_batch():
            raise EquipoiseError(
                "token_mask() must be called before every forward if no loss() ends its micro-batch: the mask that is "
                "set was used by the forward before. Call token_mask() again, token_mask(None) if all tokens count."
            )

    def _read(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        rows, length = rows_and_length(arguments, self._is_sequence_first)
        # Multi-token prediction takes the ids and positions around it, shifted: the sequences are the same.
        is_further = len(self._forwards) > 1 and PREDICTS_FURTHER.search(type(module).__name__) is not None
        is_shifted = is_further and (rows, length) == (self.inputs.rows, self.inputs.length)
        if rows:
            self.inputs = self.inputs._replace(rows=rows, length=length)
        mask, ids = padding_argument(arguments), arguments.get("input_ids")
        if isinstance(ids, Tensor):
            if self.inputs.ids is not None and ids is not self.inputs.ids and not is_traced():
                # Other tokens than those of the forward around: a decoder inside an encoder-decoder.
                sequence_ids = self.inputs.sequence_ids if is_shifted else None
                self.inputs = self.inputs._replace(mask=None, sequence_ids=sequence_ids, problem=None)
            self.inputs = self.inputs._replace(ids=ids)
        if isinstance(mask, Tensor):
            if mask.dim() == 1 and mask.shape[0] == flat_tokens(arguments):
                mask = mask[None]
            if mask.dim() == 2:
                self._read_padding(mask, module, arguments)
        if rows == 0 and self.needs_sequences:  # packed sequences may be flat
            rows, length = 1, flat_tokens(arguments)
        if self.needs_sequences and self.model.training and rows and length and not is_shifted:
            try:
                starts = sequence_starts(arguments, rows, length, self.true_hides)
            except EquipoiseError as error:
                self.inputs = self.inputs._replace(problem=str(error))
            else:
                if starts is not None:
                    self.inputs = self.inputs._replace(sequence_ids=numbered(starts))

    def _read_padding(self, mask: Tensor, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        length, rows = sequence_length(arguments), self.inputs.rows
        if mask.shape[0] == mask.shape[1] == length != rows:
            self.inputs = self.inputs._replace(mask=None, problem=None)  # says who may attend to whom
            return
        reason = None if is_traced() else self._why_not_padding(mask, rows, module, arguments)
        problem = None if reason is None else _NOT_PADDING.format(reason=reason)
        if has_cache(arguments) and mask.shape[0] == rows and mask.shape[1] > length > 0:
            mask = mask[:, mask.shape[1] - length :]
        self.inputs = self.inputs._replace(mask=mask, problem=problem)

    def _why_not_padding(self, mask: Tensor, rows: int, module: nn.Module, arguments: Mapping[str, Any]) -> str | None:
        """As far as the host can see without waiting for a GPU. It waits once: for the first mask of floats."""
        if module in self._ambiguous and isinstance(arguments.get("decoder_attention_mask"), Tensor):
            return "there is a decoder_attention_mask beside it, and nothing says which of them a router has"
        if type(mask) is not Tensor:  # a fake tensor has no values
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
        if not self._forwards:
            return
        is_compiling, forward = torch.compiler.is_compiling(), self._forwards[-1]
        error = None if is_compiling else sys.exc_info()[1]
        has_failed = output is None and error is not None and error is not forward.error
        try:
            if forward.is_own and not is_compiling and not has_failed:
                self.counter.forward_ended()
        finally:
            self._end()
        if has_failed and not self._forwards:
            self.counter.forward_failed(self._num_calls_before)

    def _end(self) -> None:
        forward = self._forwards.pop()
        self.inputs, self.has_gradient = forward.inputs, forward.has_gradient


class _Hook:
    """A module hook. A copy or a pickle of it does nothing."""

    def __init__(self, method: Any = None, names: list[str] | None = None):
        self.method, self.names = method, names

    def __call__(self, *args: Any) -> None:
        if self.method is not None:
            self.method(self.names, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


# ---- which modules to hook ----


def _modules_to_hook(model: nn.Module, routers: set[nn.Module]) -> list[nn.Module]:
    """The modules that may be called by themselves: the model, all inside it that hold every router, whole models.

    A wrapper may have its network called (a training step), and a model its base. If the model has no forward, as a
    list of pipeline stages: the modules in it instead.
    """
    if not _has_forward(model):
        holders = [child for child in model.children() if child not in routers and routers & {*child.modules()}]
        return [module for child in holders for module in _modules_to_hook(child, routers)]
    modules: list[nn.Module] = [model]
    inner: nn.Module | None = model
    while inner is not None and routers:
        inner = next((child for child in inner.children() if routers <= {*child.modules()} - {child}), None)
        if inner is not None and _has_forward(inner):
            modules.append(inner)
    for module in model.modules():
        is_whole_model = {"input_ids", "attention_mask"} <= {*argument_names(module)}
        if module not in modules and is_whole_model and routers & {*module.modules()}:
            modules.append(module)
    return modules


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def _is_ambiguous(module: nn.Module, hooked: Sequence[nn.Module], routers: set[nn.Module]) -> bool:
    """Whether it takes masks for an encoder and a decoder, and no module inside says which of them a router has."""
    inside = {*module.modules()}
    with_own_mask: set[nn.Module] = set()
    for other in hooked:
        if other is not module and other in inside and "decoder_attention_mask" not in argument_names(other):
            with_own_mask.update(other.modules())
    takes_both = {"attention_mask", "decoder_attention_mask"} <= {*argument_names(module)}
    return takes_both and any(router in inside and router not in with_own_mask for router in routers)
