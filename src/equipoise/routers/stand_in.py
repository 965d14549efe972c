"""A stand-in of a router: its own forward, with random tensors in place of its weights."""

import inspect
from collections import OrderedDict, deque
from collections.abc import Collection
from copy import copy
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from equipoise.routers.kind import ADDED_SLOT
from equipoise.routers.outputs import TOKENS, is_dense, output_names
from equipoise.routers.shapes import is_partitioned, whole_shape
from equipoise.routers.tapped import plain_class


class RandomTensors:
    """Random tensors for the stand-ins of one router: drawn once, then the same for each stand-in, in order."""

    device = "cpu"

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.next = 0
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        if self.next == len(self.drawn):
            self.drawn.append(torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu"))
        self.next += 1
        return self.drawn[self.next - 1].view(shape)


class MetaTensors(RandomTensors):
    """Tensors that have a shape and no content."""

    device = "meta"

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")


_BOUND_TO_INSTANCE = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")  # by accelerate, by compile()


def make_stand_in(router: nn.Module, random: RandomTensors, without: Collection[str] = ()) -> nn.Module:
    """The router with random matrices, vectors of ones, biases of zeros: no sharded, meta or GPU weight is touched.

    The modules in it that ``without`` names are left out.
    """
    stand_in = object.__new__(plain_class(router))  # fully_shard's classes make another one in their __new__
    stand_in.__dict__ = {
        name: copy(value) if isinstance(value, list | dict | set | deque) else value  # some routers log their calls
        for name, value in router.__dict__.items()
        if name not in _BOUND_TO_INSTANCE
    }
    stand_in._parameters = {
        name: value if value is None else nn.Parameter(stand_in_tensor(name, value, random), requires_grad=False)
        for name, value in router._parameters.items()
    }
    stand_in._buffers = {
        name: value if value is None else stand_in_tensor(name, value, random)
        for name, value in router._buffers.items()
        if name != ADDED_SLOT
    }
    stand_in._modules = {
        name: None if module is None else make_stand_in(module, random)
        for name, module in router._modules.items()
        if name not in without
    }
    if any(map(is_partitioned, router.parameters())):
        stand_in._forward_hooks, stand_in._forward_pre_hooks = OrderedDict(), OrderedDict()  # ZeRO-3 gathers by them
    return stand_in


def stand_in_tensor(name: str, value: Tensor, random: RandomTensors) -> Tensor:
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=random.device)
    shape = whole_shape(value)
    if len(shape) >= 2 and "bias" not in name:
        return random.normal(*shape)
    return torch.full(shape, 0.0 if "bias" in name else 1.0, device=random.device, dtype=torch.float32)


@cache
def takes_tokens_alone(cls: Any, forward: Any) -> bool:
    """Whether a class outside torch has a forward that needs one argument."""
    if cls.__module__.startswith("torch.") or forward is nn.Module.forward:
        return False
    _, *parameters = inspect.signature(forward).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return len([p for p in parameters if p.kind not in variable and p.default is p.empty]) == 1


def returned_form(module: nn.Module) -> Literal["choice", "dense"] | None:
    """What a module's forward returns for tokens, if it is what a router does. Computes shapes only, no numbers.

    ``choice`` are ids and weights of experts; ``dense`` two tensors of one shape, as other modules return too.
    """
    try:
        random = MetaTensors()
        stand_in = make_stand_in(module, random)
        for inside in stand_in.modules():  # a hook may communicate
            inside._forward_hooks, inside._forward_pre_hooks = OrderedDict(), OrderedDict()
        for width in matrix_widths(stand_in):
            for shape in ((TOKENS, width), (2, TOKENS // 2, width)):
                try:
                    with torch.no_grad(), torch.random.fork_rng(devices=[]):
                        output = plain_class(module).forward(stand_in, random.normal(*shape))
                except (RuntimeError, ValueError, IndexError):  # another width, or it needs numbers
                    continue
                has_choice = {"weights", "expert_ids"} <= set(output_names(output))
                return "choice" if has_choice else "dense" if is_dense(output) else None
    except Exception:  # a forward may raise anything
        return None
    return None


def matrix_widths(stand_in: nn.Module) -> list[int]:
    """Sizes of matrices. One of them is the width of a token, mostly the last dimension of the first matrix."""
    matrices = [p for p in stand_in.parameters() if p.dim() == 2]
    return list(dict.fromkeys([*(m.shape[1] for m in matrices), *(m.shape[0] for m in matrices)]))
