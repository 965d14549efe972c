"""Finds out by experiment how a router selects: its own forward, on a stand-in with random weights.

Every way in which a router may select is tried on the stand-in until one is proven. A router for which none can be
proven is refused with the reason. So a family is known by its behaviour, and one that changes its behaviour is
refused, never miscounted.
"""

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.kind import ADDED_SLOT, RouterKind, Slot
from equipoise.routers.tap import BiasedTopK, plain_class
from equipoise.routing import SCORE_FUNCTIONS, score

TOKENS = 64
GROUP_ATTRIBUTES = ("num_group", "num_groups", "n_group", "n_groups")  # where routers keep their number of groups


class Refused(EquipoiseError):
    """A router selects in no way that equipoise knows. The message is the reason."""


class Proof(NamedTuple):
    """What was proven of a router."""

    kind: RouterKind
    num_experts: int
    k: int


class _CountingTopK(BiasedTopK):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += self.is_choice(func, args)
        return super().__torch_function__(func, types, args, kwargs)


# ---- where the slot is ----


def find_slot(router: nn.Module, parent: nn.Module | None, kind: RouterKind) -> Slot | None:
    if kind.slot is None:
        return None
    *path, name = kind.slot.split(".")
    holder = router.get_submodule(".".join(path))
    is_inside = name in holder._buffers or name in holder._parameters
    return Slot(holder if is_inside or parent is None else parent, name)


def _slot_candidates(router: nn.Module, parent: nn.Module | None) -> Iterator[str]:
    """Names of the tensors that may be the slot: those called a bias."""
    for path, module in router.named_modules():
        for name in (*module._buffers, *module._parameters):
            if "bias" in name and name != "bias" and name != ADDED_SLOT:
                yield f"{path}.{name}" if path else name
    argument = None if parent is None else _slot_argument(router)
    if argument is not None and parent is not None and argument in (*parent._buffers, *parent._parameters):
        yield argument


def _slot_argument(router: nn.Module) -> str | None:
    """The argument of the router's forward by which the module around it passes the slot."""
    _, *parameters = inspect.signature(plain_class(router).forward).parameters.values()
    return next((p.name for p in parameters[1:] if "bias" in p.name), None)


# ---- the stand-in ----


class _RandomTensors:
    """Random tensors for the stand-ins of one router: drawn once, then the same for each stand-in, in order."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.next = 0
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        if self.next == len(self.drawn):
            self.drawn.append(torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu"))
        self.next += 1
        return self.drawn[self.next - 1].view(shape)


_BOUND_TO_INSTANCE = ("forward", "_old_forward", "_hf_hook")  # by the hooks of accelerate


def _stand_in(router: nn.Module, random: _RandomTensors) -> nn.Module:
    """The router with random matrices, vectors of ones, biases of zeros: no sharded, meta or GPU weight is touched."""
    stand_in = object.__new__(plain_class(router))  # fully_shard's classes make another one in their __new__
    stand_in.__dict__ = {
        name: copy(value) if isinstance(value, list | dict | set | deque) else value  # some routers log their calls
        for name, value in router.__dict__.items()
        if name not in _BOUND_TO_INSTANCE
    }
    stand_in._parameters = {
        name: value if value is None else nn.Parameter(_stand_in_tensor(name, value, random), requires_grad=False)
        for name, value in router._parameters.items()
    }
    stand_in._buffers = {
        name: value if value is None else _stand_in_tensor(name, value, random)
        for name, value in router._buffers.items()
        if name != ADDED_SLOT
    }
    stand_in._modules = {
        name: None if module is None else _stand_in(module, random) for name, module in router._modules.items()
    }
    return stand_in


def _stand_in_tensor(name: str, value: Tensor, random: _RandomTensors) -> Tensor:
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    if value.dim() >= 2 and "bias" not in name:
        return random.normal(*value.shape)
    return torch.full(value.shape, 0.0 if "bias" in name else 1.0, device="cpu", dtype=torch.float32)


class _Trial:
    """A stand-in that is run with several biases on the same random tokens."""

    def __init__(self, router: nn.Module, kind: RouterKind, parent: nn.Module | None, random: _RandomTensors):
        random.next = 0
        self.kind = kind
        self.router = _stand_in(router, random)
        dims = list(dict.fromkeys(p.shape[-1] for p in self.router.parameters() if p.dim() == 2))
        if not dims:
            raise Refused("it has no matrix of weights")
        self.inputs = [random.normal(TOKENS, dim) / dim**0.5 for dim in dims]  # one of them has the width of a token
        self.slot = find_slot(self.router, None, kind)
        self.slot_argument: str | None = None  # where the slot is in the module around
        self.counting: _CountingTopK | None = None
        if self.slot is not None and self.slot.tensor is None:
            in_parent = parent is not None and kind.slot in (*parent._buffers, *parent._parameters)
            self.slot_argument = _slot_argument(router) if in_parent else None
            if self.slot_argument is None:
                raise Refused(f"there is no buffer {kind.slot}")
        # With k = 1 the weight may be 1 whatever the score function, so the trial uses k = 2.
        self.is_top_1 = getattr(router, "top_k", None) == 1
        if self.is_top_1:
            self.router.__dict__["top_k"] = 2
        self.k = getattr(self.router, "top_k", None)

    def forward(self, **arguments: Tensor) -> Any:
        """On tokens [tokens, dim]; if the router does not take that, on [1, tokens, dim]."""
        errors: list[Exception] = []
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for tokens in self.inputs:
                for hidden in (tokens.clone(), tokens[None].clone()):  # some routers add noise in place
                    if self.counting is not None:
                        self.counting.calls = 0
                    try:
                        output = self.router.forward(hidden, **arguments)
                    except (ValueError, IndexError, RuntimeError) as caught:
                        errors.append(caught)
                        continue
                    _check_output(output, self.kind)
                    if len(output[0]) == TOKENS or tokens is self.inputs[-1]:
                        return output  # else it reshaped the tokens to another width
        raise errors[0]

    def run(self, bias: Float[Tensor, " experts"], multiplies: bool) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """(logits, weights, expert_ids), and the number of top-k calls over the experts."""
        arguments: dict[str, Tensor] = {}
        slot_value = torch.zeros_like(bias) if multiplies else bias
        if self.slot_argument is not None:
            arguments[self.slot_argument] = slot_value
        elif self.slot is not None:
            self.slot.replace(slot_value)
        self.counting = _CountingTopK(bias, multiplies) if self.slot is None or multiplies else None
        with self.counting or nullcontext():
            output = self.forward(**arguments)
        calls = 1 if self.counting is None or self.slot is not None else self.counting.calls
        return self.kind.read(output, self.k), calls


def _check_output(output: Any, kind: RouterKind) -> None:
    length = 2 if kind.gives == "dense" else 3
    has_length = isinstance(output, tuple) and (len(output) == length or len(output) > length == 3)
    if not has_length or not all(isinstance(value, Tensor) and value.dim() == 2 for value in output[:length]):
        raise Refused("forward does not return (logits, weights, expert_ids)")


def _num_experts(router: nn.Module, parent: nn.Module | None, kind: RouterKind, random: _RandomTensors) -> int:
    slot = find_slot(router, parent, kind)
    if slot is not None:
        tensor = {**slot.holder._buffers, **slot.holder._parameters}.get(slot.name)
        if tensor is None:
            raise Refused(f"there is no buffer {kind.slot}")
        return tensor.numel()
    output = _Trial(router, kind, parent, random).forward()
    return int(output[1 if kind.gives == "dense" else 0].shape[-1])


# ---- the proof ----


def prove(
    router: nn.Module,
    kind: RouterKind,
    parent: nn.Module | None = None,
    multiplies: bool = False,
    random: _RandomTensors | None = None,
) -> Proof:
    """Proves on random inputs that the router selects as ``kind`` says. Touches nothing of the model.

    Proven: the outputs are what ``kind.gives`` says. The weights are the scores of the chosen experts, up to one factor
    per token. A bias moves the choice and leaves the scores alone. Without a slot, exactly one top-k is taken over the
    experts. With ``multiplies`` the bias is w - 1 of a factor w on the scores, for which no family has a slot. Raises
    ``Refused`` with the reason.
    """
    if multiplies and kind.selection == "logits":
        raise Refused("the choice is made by logits: a factor reverses the order of experts where they are negative")
    random = _RandomTensors() if random is None else random
    num_experts = _num_experts(router, parent, kind, random)
    trial = _Trial(router, kind, parent, random)
    favourite = num_experts // 2
    is_grouped = any((getattr(trial.router, name, 1) or 1) > 1 for name in GROUP_ATTRIBUTES)
    # Without a slot for it, a bias is added after the expert groups have been chosen.
    is_blocked = is_grouped and (multiplies or kind.slot is None)
    first: tuple[Tensor, Tensor, Tensor] | None = None
    for bias in _trial_biases(num_experts, favourite, kind, multiplies):
        (logits, weights, expert_ids), calls = trial.run(bias, multiplies)
        if calls == 0:
            raise Refused("it chooses without torch.topk, to which a bias is added")
        if calls != 1:
            raise Refused(f"it calls torch.topk {calls} times over the experts, so it is unclear which call selects")
        if first is None and router.training:
            again, _ = trial.run(bias, multiplies)
            if not all(map(torch.equal, again, (logits, weights, expert_ids))):
                raise Refused("it draws random numbers in training; call eval() before attach, and train() after")
        if logits.shape != (TOKENS, num_experts) or expert_ids.dtype != torch.int64:
            raise Refused(f"the logits have shape {tuple(logits.shape)} and the expert ids {expert_ids.dtype}")
        if weights.shape != expert_ids.shape:
            raise Refused("forward does not return (logits, weights, expert_ids)")
        first = first or (logits, weights, expert_ids)
        same_choice = (expert_ids == first[2]).all(-1)
        if not torch.allclose(weights[same_choice], first[1][same_choice], rtol=1e-4):
            raise Refused("the bias changes the weights of the same choice")
        ranked = kind.ranked(logits.float())
        choice = ranked * (1 + bias) if multiplies else ranked + bias
        best = choice.topk(expert_ids.shape[-1]).indices
        if (not is_grouped or is_blocked) and (expert_ids.sort().values != best.sort().values).any():
            if is_blocked:
                raise Refused("there are groups, which are chosen before the bias is added")
            raise Refused("the chosen experts are not the best by these scores and the bias")
        factor = weights / score(logits.float(), kind.score_function).gather(-1, expert_ids)
        if not torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-4):
            raise Refused("the weights are not in proportion to these scores")
    if not (expert_ids == favourite).any(-1).all():  # under the last bias
        raise Refused("a large bias does not move the choice")
    return Proof(kind, num_experts, 1 if trial.is_top_1 else int(expert_ids.shape[-1]))


def _trial_biases(
    num_experts: int, favourite: int, kind: RouterKind, multiplies: bool
) -> tuple[Float[Tensor, " experts"], Float[Tensor, " experts"], Float[Tensor, " experts"]]:
    """A zero bias, a moderate one, and one that is large for a single expert."""
    zero = torch.zeros(num_experts, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, num_experts, generator=generator, dtype=torch.float32, device="cpu")
    large = zero.clone()
    large[favourite] = 1e30 if multiplies else 100.0  # a softmax score may be very small
    return zero, 0.3 * kind.ranked(noise)[0], large


def discover(router: nn.Module, parent: nn.Module | None = None) -> Proof:
    """The first kind that can be proven of the router, which ``parent`` holds. Raises ``Refused`` if there is none."""
    if chooses_by_id(router):
        raise Refused("it chooses by the id of the token (a hash router), which no bias moves")
    reasons: list[str] = []
    random = _RandomTensors()
    slots: list[str | None] = [*_slot_candidates(router, parent)]
    for slot in slots or [None]:
        for kind in _kinds(slot):
            try:
                return prove(router, kind, parent, random=random)
            except Refused as refused:
                reasons.append(str(refused))
            except Exception as error:  # a forward may raise anything on random tokens
                reasons.append(f"its forward needs more than tokens ({type(error).__name__}: {error})")
    raise Refused(reasons[0])


def chooses_by_id(router: nn.Module) -> bool:
    """Whether it is a hash router: its forward is given the ids of the tokens."""
    return "input_ids" in inspect.signature(plain_class(router).forward).parameters


def _kinds(slot: str | None) -> Iterator[RouterKind]:
    for gives in get_args(RouterKind.__annotations__["gives"]):
        for score_function in SCORE_FUNCTIONS:
            for selection in get_args(RouterKind.__annotations__["selection"]):
                yield RouterKind(score_function, slot, selection, gives)
