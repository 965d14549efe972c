"""How a router selects, found out by what it does: its own forward on a stand-in with random weights.

Every way in which a router may select is tried on the stand-in until one is proven; a router that proves none is
refused with the reason. So a family is known by its behaviour, and one that changes it is refused, never miscounted.
"""

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.tap import OWN_SLOT, BiasedTopK, RouterKind, Slot, is_choice, plain_class
from equipoise.routing import SCORE_FUNCTIONS, score

__all__ = ["Proof", "Refused", "chooses_by_id", "discover", "find_slot", "prove"]

TOKENS = 64
GROUPS = ("num_group", "num_groups", "n_group", "n_groups")  # what routers call their number of groups


class Refused(EquipoiseError):
    """A router that selects in no way that equipoise knows; the message is the reason."""


class Proof(NamedTuple):
    """What was proven of a router."""

    kind: RouterKind
    num_experts: int
    k: int


class _CountingTopK(BiasedTopK):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += is_choice(func, args, self.bias)
        return super().__torch_function__(func, types, args, kwargs)


# ---- where the slot is ----


def find_slot(router: nn.Module, parent: nn.Module | None, kind: RouterKind) -> Slot | None:
    """Where the slot of this kind is held; None for a kind without one."""
    if kind.slot is None:
        return None
    *path, name = kind.slot.split(".")
    holder = router.get_submodule(".".join(path))
    if name in holder._buffers or name in holder._parameters or parent is None:
        return Slot(holder, name)
    return Slot(parent, name)


def _find_slots(router: nn.Module, parent: nn.Module | None) -> Iterator[str]:
    """Names of the tensors that may be the slot: called a bias, of one number an expert, never trained."""
    for path, module in router.named_modules():
        for name in (*module._buffers, *module._parameters):
            if "bias" in name and name != "bias" and name != OWN_SLOT:
                yield f"{path}.{name}" if path else name
    argument = None if parent is None else _slot_argument(router)
    if argument is not None and argument in (*parent._buffers, *parent._parameters):
        yield argument


def _slot_argument(router: nn.Module) -> str | None:
    """The argument by which the module around it passes the slot to its forward."""
    _, *others = inspect.signature(plain_class(router).forward).parameters.values()
    return next((p.name for p in others[1:] if "bias" in p.name), None)


# ---- the stand-in ----


class _Draws:
    """Random tensors for the stand-ins of one router: drawn once, the same for each of them, in order."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.next = 0
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        if self.next == len(self.kept):
            self.kept.append(torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu"))
        self.next += 1
        return self.kept[self.next - 1].view(shape)


_OF_INSTANCE = ("forward", "_old_forward", "_hf_hook")  # bound to the module itself, as the hooks of accelerate are


def _stand_in(router: nn.Module, draws: _Draws) -> nn.Module:
    """The router and what is inside it with weights of our own, so that sharded, meta and GPU weights need not be
    touched: random matrices, vectors of ones, biases of zeros."""
    made = object.__new__(plain_class(router))  # a class of fully_shard makes another one by its own __new__
    made.__dict__ = {
        name: copy(held) if isinstance(held, list | dict | set | deque) else held  # some keep what they see
        for name, held in router.__dict__.items()
        if name not in _OF_INSTANCE
    }
    made._parameters = {
        name: value if value is None else nn.Parameter(_made_up(name, value, draws), requires_grad=False)
        for name, value in router._parameters.items()
    }
    made._buffers = {
        name: value if value is None else _made_up(name, value, draws)
        for name, value in router._buffers.items()
        if name != OWN_SLOT
    }
    made._modules = {
        name: None if module is None else _stand_in(module, draws) for name, module in router._modules.items()
    }
    return made


def _made_up(name: str, value: Tensor, draws: _Draws) -> Tensor:
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    if "bias" in name:
        return torch.zeros(value.shape, device="cpu", dtype=torch.float32)
    if value.dim() < 2:
        return torch.ones(value.shape, device="cpu", dtype=torch.float32)
    return draws.normal(*value.shape)


class _Trial:
    """One stand-in, run with a bias on the same random tokens."""

    def __init__(self, router: nn.Module, kind: RouterKind, parent: nn.Module | None, draws: _Draws):
        draws.next = 0
        self.kind = kind
        self.router = _stand_in(router, draws)
        dims = list(dict.fromkeys(p.shape[-1] for p in self.router.parameters() if p.dim() == 2))
        if not dims:
            raise Refused("it has no matrix of weights")
        self.hidden = [draws.normal(TOKENS, dim) / dim**0.5 for dim in dims]  # the width is one of them
        self.argument = _slot_argument(self.router)
        self.slot = find_slot(self.router, None, kind)
        self.passed = False  # the slot is given as an argument
        self.counting: _CountingTopK | None = None
        if self.slot is not None and self.slot.tensor is None:
            if parent is None or kind.slot not in (*parent._buffers, *parent._parameters) or self.argument is None:
                raise Refused(f"there is no buffer {kind.slot}")
            self.passed = True
        self.is_raised = getattr(router, "top_k", None) == 1
        if self.is_raised:  # the weight of one expert may be 1 whatever the score function; that of two tells it
            self.router.__dict__["top_k"] = 2
        self.k = getattr(self.router, "top_k", None)

    def forward(self, **arguments: Tensor) -> Any:
        """Of the tokens in a row, or, where the router does not take that, of a batch of one sequence."""
        error: Exception | None = None
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for hidden in self.hidden:
                for shaped in (hidden.clone(), hidden[None].clone()):  # some add noise in place
                    if self.counting is not None:
                        self.counting.calls = 0
                    try:
                        output = self.router.forward(shaped, **arguments)
                    except (ValueError, IndexError, RuntimeError) as caught:
                        error = error or caught
                        continue
                    _check_output(output, self.kind)
                    if len(output[0]) == TOKENS or hidden is self.hidden[-1]:  # else they were cut in another way
                        return output
        assert error is not None
        raise error

    def run(self, bias: Float[Tensor, " experts"], multiplies: bool) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """(logits, weights, expert_ids), and the number of top-k calls over the experts."""
        arguments: dict[str, Tensor] = {}
        held = torch.zeros_like(bias) if multiplies else bias
        if self.passed:
            assert self.argument is not None
            arguments[self.argument] = held
        elif self.slot is not None:
            self.slot.replace(held)
        steers_by_mode = self.slot is None or multiplies
        self.counting = _CountingTopK(bias, multiplies) if steers_by_mode else None
        with self.counting or nullcontext():
            output = self.forward(**arguments)
        calls = 1 if self.counting is None or self.slot is not None else self.counting.calls
        return self.kind.read(output, self.k), calls


def _check_output(output: Any, kind: RouterKind) -> None:
    length = 2 if kind.gives == "dense" else 3
    whole = isinstance(output, tuple) and (len(output) == 2 if length == 2 else len(output) >= 3)
    if not whole or not all(isinstance(value, Tensor) and value.dim() == 2 for value in output[:length]):
        raise Refused("forward does not return (logits, weights, expert_ids)")


def _num_experts(router: nn.Module, parent: nn.Module | None, kind: RouterKind, draws: _Draws) -> int:
    """From the slot; without one from the logits of a run."""
    slot = find_slot(router, parent, kind)
    if slot is not None:
        held = slot.holder._buffers.get(slot.name)
        held = slot.holder._parameters.get(slot.name) if held is None else held
        if held is None:
            raise Refused(f"there is no buffer {kind.slot}")
        return held.numel()
    output = _Trial(router, kind, parent, draws).forward()
    return int(output[1 if kind.gives == "dense" else 0].shape[-1])


# ---- the proof ----


def prove(
    router: nn.Module,
    kind: RouterKind,
    parent: nn.Module | None = None,
    multiplies: bool = False,
    draws: _Draws | None = None,
) -> Proof:
    """Proves on random inputs that the router selects as ``kind`` says. Touches nothing of the model's.

    Proven: the outputs are what ``kind.gives`` says; the weights are the router's scores of the chosen experts up to one
    factor a token; a bias moves the choice and leaves the scores alone; without a slot, exactly one top-k is taken
    over the experts. With ``multiplies`` the bias is a factor 1 + bias, for which no family has a slot. Raises
    ``Refused`` with the reason.
    """
    if multiplies and kind.selection == "logits":
        raise Refused("the choice is made by logits, which a factor turns upside down where they are below zero")
    draws = _Draws() if draws is None else draws
    num_experts = _num_experts(router, parent, kind, draws)
    trial = _Trial(router, kind, parent, draws)
    generator = torch.Generator().manual_seed(1)
    favourite = torch.zeros(num_experts, device="cpu", dtype=torch.float32)
    favourite[num_experts // 2] = 1e30 if multiplies else 100.0  # a softmax score may be very small
    noise = torch.randn(1, num_experts, generator=generator, dtype=torch.float32, device="cpu")
    moderate = 0.3 * kind.values(noise)[0]
    grouped = any((getattr(trial.router, name, 1) or 1) > 1 for name in GROUPS)
    in_the_way = grouped and (multiplies or kind.slot is None)  # they would be chosen before the bias is added
    first: tuple[Tensor, Tensor, Tensor] | None = None
    for bias in (torch.zeros_like(favourite), moderate, favourite):
        (logits, weights, expert_ids), calls = trial.run(bias, multiplies)
        if calls != 1:
            raise Refused(
                f"it calls torch.topk {calls} times over the experts, and which of them chooses cannot be told"
                if calls
                else "it chooses without torch.topk, to which a bias is added"
            )
        if first is None and router.training:
            again, _ = trial.run(bias, multiplies)
            if not all(map(torch.equal, again, (logits, weights, expert_ids))):
                raise Refused("it draws random numbers in training; call eval() before attach, and train() after")
        if logits.shape != (TOKENS, num_experts) or expert_ids.dtype != torch.int64:
            raise Refused(f"the logits have shape {tuple(logits.shape)} and the expert ids {expert_ids.dtype}")
        if weights.shape != expert_ids.shape:
            raise Refused("forward does not return (logits, weights, expert_ids)")
        first = first or (logits, weights, expert_ids)
        same = (expert_ids == first[2]).all(-1)
        if not torch.allclose(weights[same], first[1][same], rtol=1e-4):
            raise Refused("the bias changes the weights of the same choice")
        values = kind.values(logits.float())
        choice = values * (1 + bias) if multiplies else values + bias
        best = choice.topk(expert_ids.shape[-1]).indices
        if (not grouped or in_the_way) and (expert_ids.sort().values != best.sort().values).any():
            if in_the_way:
                raise Refused("there are groups, which are chosen before the bias is added")
            raise Refused("the chosen experts are not the best by these scores and the bias")
        factor = weights / score(logits.float(), kind.score_function).gather(-1, expert_ids)
        if not torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-4):
            raise Refused("the weights are not in proportion to these scores")
    if not (expert_ids == num_experts // 2).any(-1).all():
        raise Refused("a large bias does not move the choice")
    return Proof(kind, num_experts, 1 if trial.is_raised else int(expert_ids.shape[-1]))


def discover(router: nn.Module, parent: nn.Module | None = None) -> Proof:
    """The first kind that can be proven of the router, which ``parent`` holds; ``Refused``, with a reason, if none."""
    if chooses_by_id(router):
        raise Refused("it chooses by the id of the token (a hash router), which no bias moves")
    reasons: list[str] = []
    draws = _Draws()
    slots: list[str | None] = [*_find_slots(router, parent)]
    for slot in slots or [None]:
        for kind in _kinds(slot):
            try:
                return prove(router, kind, parent, draws=draws)
            except Refused as refused:
                reasons.append(str(refused))
            except Exception as error:  # whatever a forward makes of tokens that are not its own
                reasons.append(f"its forward needs more than tokens ({type(error).__name__}: {error})")
    raise Refused(reasons[0])


def chooses_by_id(router: nn.Module) -> bool:
    """Whether it is a hash router: its forward is given the ids of the tokens."""
    return "input_ids" in inspect.signature(plain_class(router).forward).parameters


def _kinds(slot: str | None) -> Iterator[RouterKind]:
    for gives in ("logits", "probabilities", "dense"):
        for score_function in SCORE_FUNCTIONS:
            for selection in ("scores", "logits"):
                yield RouterKind(score_function, slot, selection, gives)
