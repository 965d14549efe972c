"""Finds out by experiment how a router selects: its own forward, on a stand-in with random weights.

Every way in which a router may select is tried on the stand-in until one is proven. A router for which none can be
proven is refused with the reason. So a family is known by its behaviour, and one that changes its behaviour is
refused, never miscounted.
"""

import inspect
from collections import OrderedDict, deque
from collections.abc import Iterator
from copy import copy
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.kind import ADDED_SLOT, RouterKind, Slot
from equipoise.routers.tap import BiasedTopK, plain_class
from equipoise.routing import SCORE_FUNCTIONS, score

TOKENS = 64
# Where routers keep their number of groups.
GROUP_ATTRIBUTES = ("num_group", "num_groups", "n_group", "n_groups", "num_expert_group")
CONTRACT = (
    "A router has the gate and the top-k in one module. Its forward takes tokens [..., dim] and returns (logits [..., "
    "experts], weights [..., k], expert_ids [..., k]). The block around multiplies the outputs of the experts by these "
    "weights. equipoise.nn.Router is one"
)
LEAVE_OUT = "Leave it out with attach(where=...), or choose experts with equipoise.nn.Router"


class Refused(EquipoiseError):
    """A router selects in no way that equipoise knows. The message is the reason, ``remedy`` what to do about it.

    ``progress`` orders reasons: a kind that is refused later in its proof fits better.
    """

    def __init__(self, reason: str, remedy: str = LEAVE_OUT, progress: int = 0):
        super().__init__(reason)
        self.remedy, self.progress = remedy, progress


class Proof(NamedTuple):
    """What was proven of a router."""

    kind: RouterKind
    num_experts: int
    k: int
    dimensions: tuple[int, ...] = (2, 3)  # of the inputs that it was proven on: [tokens, dim], [batch, sequence, dim]
    obstacle: str | None = None  # why no bias steers it; the rest is proven


# ---- where the slot is ----


def find_slot(router: nn.Module, parent: nn.Module | None, kind: RouterKind) -> Slot | None:
    if kind.slot is None:
        return None
    *path, name = kind.slot.split(".")
    holder = router.get_submodule(".".join(path))
    is_inside = name in holder._buffers or name in holder._parameters
    return Slot(holder if is_inside or parent is None else parent, name)


def _tensors_passed(router: nn.Module, parent: nn.Module | None) -> dict[str, Any]:
    """Tensors of the module around that it passes to the router's forward: an argument has the tensor's name."""
    if parent is None:
        return {}
    tensors = {**parent._buffers, **parent._parameters}
    return {name: tensors[name] for name in _arguments(router)[1:] if tensors.get(name) is not None}


def _arguments(module: nn.Module, required: bool = False) -> list[str]:
    """Names of the arguments of a module's forward."""
    _, *parameters = inspect.signature(plain_class(module).forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if not required or p.default is p.empty]


# ---- the stand-in ----


class _RandomTensors:
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


class _MetaTensors(_RandomTensors):
    """Tensors that have a shape and no content."""

    device = "meta"

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")


_BOUND_TO_INSTANCE = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")  # by accelerate, by compile()


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
        return torch.zeros(value.shape, dtype=value.dtype, device=random.device)
    if value.dim() >= 2 and "bias" not in name:
        return random.normal(*value.shape)
    return torch.full(value.shape, 0.0 if "bias" in name else 1.0, device=random.device, dtype=torch.float32)


@cache
def takes_tokens_alone(cls: Any, forward: Any) -> bool:
    """Whether a class outside torch has a forward that needs one argument."""
    if cls.__module__.startswith("torch.") or forward is nn.Module.forward:
        return False
    _, *parameters = inspect.signature(forward).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.default for p in parameters if p.kind not in variable and p.default is p.empty] == [
        inspect.Parameter.empty
    ]


def returned_form(module: nn.Module) -> Literal["choice", "dense"] | None:
    """What a module's forward returns for tokens, if it is what a router does. Computes shapes only, no numbers.

    ``choice`` are ids and weights of experts; ``dense`` two tensors of one shape, as other modules return too.
    """
    try:
        random = _MetaTensors()
        stand_in = _stand_in(module, random)
        for inside in stand_in.modules():  # a hook may communicate
            inside._forward_hooks, inside._forward_pre_hooks = OrderedDict(), OrderedDict()
        for width in _widths(stand_in):
            for shape in ((TOKENS, width), (2, TOKENS // 2, width)):
                try:
                    with torch.no_grad(), torch.random.fork_rng(devices=[]):
                        output = plain_class(module).forward(stand_in, random.normal(*shape))
                except (RuntimeError, ValueError, IndexError):  # another width, or it needs numbers
                    continue
                has_choice = {"weights", "expert_ids"} <= set(_output_names(output))
                return "choice" if has_choice else "dense" if _is_dense(output) else None
    except Exception:  # a forward may raise anything
        return None
    return None


def _widths(stand_in: nn.Module) -> list[int]:
    """Sizes of matrices. One of them is the width of a token, mostly the last dimension of the first matrix."""
    matrices = [p for p in stand_in.parameters() if p.dim() == 2]
    return list(dict.fromkeys([*(m.shape[1] for m in matrices), *(m.shape[0] for m in matrices)]))


# ---- what a forward returns ----


def _is_dense(output: Any) -> bool:
    """Whether it may be (scores, logits), both with a number for each token and expert."""
    if not isinstance(output, tuple) or len(output) != 2 or not all(isinstance(value, Tensor) for value in output):
        return False
    return output[0].dim() >= 2 and output[0].shape == output[1].shape and all(v.is_floating_point() for v in output)


def _output_names(output: Any) -> list[str]:
    """What the outputs of a router are, by shapes and dtypes: logits, weights, expert_ids, or ``_`` for others."""
    values = list(output) if isinstance(output, tuple | list) else [output]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() >= 2]
    ids = next((value for value in tensors if value.dtype in (torch.int64, torch.int32)), None)
    like_ids = [v for v in tensors if ids is not None and v.is_floating_point() and v.shape == ids.shape]
    names = ["_"] * len(values)
    if len(like_ids) == 2:  # all experts are chosen: only the order tells logits from weights
        in_order = len(values) > 2 and values[0] is like_ids[0] and values[1] is like_ids[1] and values[2] is ids
        return ["logits", "weights", "expert_ids", *names[3:]] if in_order else names
    for number, value in enumerate(values):
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if value is ids:
            names[number] = "expert_ids"
        elif like_ids and value is like_ids[0]:
            names[number] = "weights"
        elif value.is_floating_point() and "logits" not in names and len(value.flatten(0, -2)) == TOKENS:
            names[number] = "logits"
    return names


def _check_output(output: Any, router: nn.Module) -> None:
    """Raises ``Refused`` for what is neither (logits, weights, expert_ids, ...) nor (scores, logits)."""
    names = _output_names(output)
    if isinstance(output, tuple) and (names[:3] == ["logits", "weights", "expert_ids"] or _is_dense(output)):
        if names[2:3] == ["expert_ids"] and output[2].dtype != torch.int64:
            raise Refused(
                f"the ids of its experts must be int64, and are {output[2].dtype}", "Convert them, ids.long()"
            )
        return
    must = "its forward does not return (logits, weights, expert_ids)"
    if isinstance(output, Tensor):
        raise Refused(f"{must} but one tensor of shape {tuple(output.shape)} for {TOKENS} tokens", CONTRACT)
    if not isinstance(output, tuple | list):
        raise Refused(f"{must} but a {type(output).__name__}", CONTRACT)
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in output]
    if "expert_ids" not in names or "weights" not in names or _is_mask(output[names.index("expert_ids")]):
        raise Refused(f"{must} but {len(shapes)} outputs: {', '.join(map(str, shapes))}", CONTRACT)
    raise Refused(f"{must} but ({', '.join(names)}){' in a list' * isinstance(output, list)}", _adapter(router, names))


def _is_mask(ids: Tensor) -> bool:
    """Whether integers are no ids: the experts of a token are different ones."""
    return bool((ids.sort(-1).values.diff(dim=-1) == 0).any())


def _adapter(router: nn.Module, names: list[str]) -> str:
    """A subclass of the router that returns what ``attach`` reads."""
    cls, hidden = plain_class(router).__name__, _arguments(router)[0]
    weight = next((name for name, p in router.named_parameters() if p.dim() == 2), "weight")
    logits = "logits" if "logits" in names else f"F.linear({hidden}.flatten(0, -2).float(), self.{weight}.float())"
    return (
        "Return them in that order, and take them so in the block that calls it:\n"
        f"    class Adapted{cls}({cls}):\n"
        f"        def forward(self, {hidden}):\n"
        f"            {', '.join(names)} = super().forward({hidden})\n"
        f"            return {logits}, weights, expert_ids\n"
    )


# ---- the trial ----


class _Tensor(NamedTuple):
    """A tensor of a stand-in with a number for each expert."""

    place: dict[str, Any]  # what holds it
    name: str  # there
    neutral: Tensor  # the choice and the weights as they are without it
    random: tuple[Tensor, Tensor]
    may_be_slot: bool

    def put(self, value: Tensor) -> None:
        is_parameter = isinstance(self.place[self.name], nn.Parameter)
        self.place[self.name] = nn.Parameter(value, requires_grad=False) if is_parameter else value


class _Trial:
    """A stand-in that is run with several biases on the same random tokens."""

    def __init__(self, router: nn.Module, parent: nn.Module | None, random: _RandomTensors, top_k: int | None = None):
        random.next = 0
        self.router = _stand_in(router, random)
        if top_k is not None:
            self.router.__dict__["top_k"] = top_k
        passed = _tensors_passed(router, parent)
        self.arguments = {name: _stand_in_tensor(name, value, random) for name, value in passed.items()}
        if needed := [name for name in _arguments(router, required=True)[1:] if name not in self.arguments]:
            raise Refused(f"its forward needs {' and '.join(needed)} beside the tokens", CONTRACT)
        widths = _widths(self.router)
        if not widths:
            raise Refused("it has no matrix of weights", CONTRACT)
        self.inputs, output = self._fitting_inputs(widths, random)
        if not self.inputs and _num_tokens(output) is not None:
            raise Refused(f"its forward gives {_num_tokens(output)} rows for {TOKENS} tokens", CONTRACT)
        _check_output(output, router)
        self.is_dense = _is_dense(output)
        self.num_experts = int(output[1 if self.is_dense else 0].shape[-1])
        chosen = (output[0] != 0).sum(-1).max() if self.is_dense else output[2].shape[-1]
        self.k = int(chosen)
        self.has_groups = any((getattr(self.router, name, 1) or 1) > 1 for name in GROUP_ATTRIBUTES)
        self.by_expert = dict(self._tensors_by_expert())
        self._plain: dict[Any, Any] = {}

    def _fitting_inputs(self, widths: list[int], random: _RandomTensors) -> tuple[list[Tensor], Any]:
        """The tokens that the forward takes, [tokens, dim] and [batch, sequence, dim], and an output."""
        errors: list[Exception] = []
        output, others = None, []
        for width in widths:
            tokens = random.normal(TOKENS, width) / width**0.5
            inputs: list[Tensor] = []
            for hidden in (tokens, tokens.view(2, TOKENS // 2, width)):
                try:
                    new = self._forward(hidden)
                except Exception as error:  # a forward may raise anything on random tokens
                    errors.append(error)
                    continue
                if _num_tokens(new) != TOKENS:  # it reshaped the tokens to another width
                    others.append(new)
                elif not inputs or _output_names(new) == _output_names(output):
                    output = output if inputs else new
                    inputs.append(hidden)
            if inputs:
                return inputs, output
        if not others:
            raise self._failure(errors[0])
        return [], others[0]

    def _failure(self, error: Exception) -> Refused:
        """Why the forward failed on every input."""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        was_training = self.router.training
        if any(p.dim() >= 2 and not p.is_floating_point() for p in self.router.parameters()):
            return Refused(
                f"its weights are quantised, and its forward raised {text}",
                "Attach before the weights are quantised, or keep routers out of the quantisation",
            )
        self.router.train(not was_training)
        try:
            self._forward(torch.zeros(TOKENS, _widths(self.router)[0], device="cpu"))
        except Exception:
            return Refused(f"its forward raised {text}, on random tokens [{TOKENS}, dim]", CONTRACT)
        finally:
            self.router.train(was_training)
        mode, other = ("training", "eval()") if was_training else ("evaluation", "train()")
        return Refused(
            f"its forward raised {text}, in {mode} mode only",
            f"Take a version of the model that runs in {mode} mode, or call {other} before attach if it stays so",
        )

    def _forward(self, hidden: Tensor) -> Any:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.router.forward(hidden.clone(), **self.arguments)  # some routers add noise in place

    def _tensors_by_expert(self) -> Iterator[tuple[str, _Tensor]]:
        generator = torch.Generator().manual_seed(2)
        places: list[tuple[str, dict[str, Any], bool]] = [("", self.arguments, True)]
        for path, module in self.router.named_modules():
            prefix = f"{path}." if path else ""
            places += [(prefix, place, True) for place in (module._parameters, module._buffers)]
            places.append((prefix, module.__dict__, False))
        for prefix, place, is_registered in places:
            for name, value in list(place.items()):
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                is_by_expert = self.num_experts in (value.shape[-1], value.numel())
                if not is_by_expert or not (value.is_floating_point() or value.dtype == torch.bool):
                    continue
                # All different, and then in the opposite order. Positive, for a tensor that is divided by.
                order = torch.randperm(value.numel(), generator=generator, device="cpu").view(value.shape)
                if value.is_floating_point():
                    first = 0.5 + order.float() / max(value.numel() - 1, 1)
                    second = 2 - first
                else:
                    first, second = order % 2 == 0, order % 2 == 1
                may_be_slot = is_registered and value.is_floating_point() and value.numel() == self.num_experts
                yield prefix + name, _Tensor(place, name, value.detach(), (first, second), may_be_slot)

    def fill(self, is_neutral: bool) -> None:
        for tensor in self.by_expert.values():
            tensor.put(tensor.neutral if is_neutral else tensor.random[0])

    @cached_property
    def acting(self) -> list[str]:
        """Names of the tensors on which the choice depends beyond the logits."""
        if not self.by_expert:
            return []
        names = []
        self.fill(is_neutral=False)
        logits, expert_ids = self._choice()
        for name, tensor in self.by_expert.items():
            tensor.put(tensor.random[1])
            new_logits, new_ids = self._choice()
            tensor.put(tensor.random[0])
            if torch.equal(logits, new_logits) and not torch.equal(expert_ids, new_ids):
                names.append(name)
        return names

    def _choice(self) -> tuple[Tensor, Tensor]:
        kind = RouterKind("softmax", gives="dense" if self.is_dense else "logits")  # of any score function
        logits, _, expert_ids = kind.read(self._forward(self.inputs[0]), self.k)
        return logits, expert_ids if self.k == self.num_experts else expert_ids.sort().values

    def run(self, hidden: Tensor, slot: str | None, bias: Tensor | None = None, is_neutral: bool = True) -> Any:
        """What the forward returns with a bias in the slot, or 0."""
        self.fill(is_neutral)
        if slot is not None:
            tensor = self.by_expert[slot]
            tensor.put(torch.zeros_like(tensor.neutral) if bias is None else bias.view(tensor.neutral.shape))
        return self._forward(hidden)

    def run_plain(self, hidden: Tensor, slot: str | None, is_neutral: bool = True) -> Any:
        """The same without a bias, computed once for all kinds."""
        key = (hidden.dim(), slot, is_neutral)
        if key not in self._plain:
            self._plain[key] = self.run(hidden, slot, is_neutral=is_neutral)
        return self._plain[key]


def _num_tokens(output: Any) -> int | None:
    """Rows of the first output, once batch and sequence are flattened."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first.numel() // first.shape[-1] if isinstance(first, Tensor) and first.dim() >= 2 else None


# ---- the proof ----


def prove(
    router: nn.Module,
    kind: RouterKind,
    parent: nn.Module | None = None,
    multiplies: bool = False,
) -> Proof:
    """Proves on random inputs that the router selects as ``kind`` says. Touches nothing of the model.

    Proven, for tokens [tokens, dim] and [batch, sequence, dim], whichever the forward takes: the outputs are what
    ``kind.gives`` says. The weights are the scores of the chosen experts, up to one factor per token. The choice
    depends on nothing but the logits and the slot. A bias moves the choice and leaves the scores alone. Without a slot,
    exactly one top-k is taken over the experts; if it is not, ``Proof.obstacle`` says so. With ``multiplies`` the bias
    is w - 1 of a factor w on the scores, for which no family has a slot. Raises ``Refused`` with the reason.
    """
    if multiplies and kind.selection == "logits":
        raise Refused("the choice is made by logits: a factor reverses the order of experts where they are negative")
    trials = _Trials(router, parent)
    return _prove(trials, kind, multiplies)[0]


class _Trials:
    """The trials of one router, each made when it is needed."""

    def __init__(self, router: nn.Module, parent: nn.Module | None):
        self.router, self.parent, self.random = router, parent, _RandomTensors()

    @cached_property
    def as_is(self) -> _Trial:
        return _Trial(self.router, self.parent, self.random)

    @cached_property
    def top_2(self) -> _Trial | None:
        """With k = 1 the weight may be 1 whatever the score function: with k = 2 the weights show it."""
        if getattr(self.router, "top_k", None) != 1:
            return None
        try:
            return _Trial(self.router, self.parent, self.random, top_k=2)
        except Refused:  # its forward is made for k = 1
            return None


def _prove(trials: _Trials, kind: RouterKind, multiplies: bool = False) -> tuple[Proof, bool]:
    """A proof, and whether anything but the choice shows the score function."""
    trial = trials.as_is
    if trial.is_dense != (kind.gives == "dense"):
        raise Refused(f"its forward does not return what gives={kind.gives!r} says", CONTRACT)
    _check_slot(trial, kind.slot)
    if trial.router.training:
        runs = (trial.run_plain(trial.inputs[0], kind.slot), trial.run(trial.inputs[0], kind.slot))
        if not all(map(torch.equal, *(kind.read(run, trial.k) for run in runs))):
            what_to_do = "Call eval() before attach, and train() after"
            raise Refused("it draws random numbers in training", what_to_do, progress=3)
    results: list[tuple[int, str | None, bool]] = []
    failure: Refused | None = None
    for hidden in trial.inputs:
        try:
            results.append((hidden.dim(), *_check(trial, hidden, kind, multiplies)))
        except Refused as refused:
            failure = failure or refused
    if not results:
        assert failure is not None
        raise failure
    obstacle = None if any(o is None for _, o, _ in results) else results[0][1]
    dimensions = tuple(number for number, o, _ in results if (o is None) == (obstacle is None))
    is_shown = all(shown for _, _, shown in results)
    if not is_shown and trials.top_2 is not None:
        _, is_shown = _check(trials.top_2, trials.top_2.inputs[0], kind, multiplies)
    return Proof(kind, trial.num_experts, trial.k, dimensions, obstacle), is_shown


def _check_slot(trial: _Trial, slot: str | None) -> None:
    """Raises ``Refused`` if the choice depends on other tensors than the slot."""
    if slot is not None and not (slot in trial.by_expert and trial.by_expert[slot].may_be_slot):
        reason = f"its slot {slot} is no buffer or parameter with a number for each of its {trial.num_experts} experts"
        raise Refused(reason, "Correct the slot of its router_kind")
    others = [name for name in trial.acting if name != slot]
    if others:
        names = " and ".join(others)
        raise Refused(
            f"its choice depends on {names} beside its logits" + (f" and its slot {slot}" if slot else ""),
            "A router may have one term beside its logits that moves the choice: a buffer or a parameter with one "
            "number per expert, which is added to the scores for the top-k. " + LEAVE_OUT,
            progress=3,
        )


def _check(trial: _Trial, hidden: Tensor, kind: RouterKind, multiplies: bool) -> tuple[str | None, bool]:
    """Raises ``Refused`` if the router does not select as ``kind`` says. Gives what keeps a bias from steering it, and
    whether the weights show the score function."""
    plain = kind.read(trial.run_plain(hidden, kind.slot), trial.k)
    zero = torch.zeros(trial.num_experts, device="cpu", dtype=torch.float32)
    is_shown = _check_weights(plain, plain, kind)
    _check_experts(plain, trial, kind, zero, multiplies)
    if any(name != kind.slot for name in trial.by_expert):  # what else has a number for each expert must not choose
        other = kind.read(trial.run_plain(hidden, kind.slot, is_neutral=False), trial.k)
        _check_experts(other, trial, kind, zero, multiplies)
    try:
        for bias in _trial_biases(trial.num_experts, kind, multiplies):
            is_shown &= _check_bias(trial, hidden, kind, bias, multiplies, plain)
    except Refused as refused:
        if kind.slot is not None and not multiplies:
            raise Refused(f"{kind.slot} is no slot that steers it: {refused}", progress=refused.progress) from None
        if multiplies:
            raise
        return str(refused), is_shown
    return None, is_shown


def _check_bias(
    trial: _Trial,
    hidden: Tensor,
    kind: RouterKind,
    bias: Float[Tensor, " experts"],
    multiplies: bool,
    plain: tuple[Tensor, Tensor, Tensor],
) -> bool:
    """Raises ``Refused`` if a bias does not steer the router, or does more. Whether the weights show the scores."""
    if kind.slot is None or multiplies:
        top_k = BiasedTopK(bias, multiplies)
        with top_k:
            returned = trial.run(hidden, kind.slot)
        output = kind.read(returned, trial.k)
        if top_k.num_choices != 1:
            raise Refused(_why_unsteered(top_k.num_choices), progress=2)
    else:
        output = kind.read(trial.run(hidden, kind.slot, bias), trial.k)
    is_shown = _check_weights(output, plain, kind)
    _check_experts(output, trial, kind, bias, multiplies)
    return is_shown


def _why_unsteered(num_choices: int) -> str:
    if num_choices == 0:
        return "it chooses without torch.topk, to which a bias is added"
    return f"it calls torch.topk {num_choices} times over the experts, so it is unclear which call selects"


def _check_weights(
    output: tuple[Tensor, Tensor, Tensor], plain: tuple[Tensor, Tensor, Tensor], kind: RouterKind
) -> bool:
    """Raises ``Refused`` if the weights are not the scores of the chosen, up to a factor. Whether they show the scores.

    With k = 1 the factor must be the same for all tokens, or else the weight is constant and shows nothing.
    """
    logits, weights, expert_ids = output
    same_choice = (expert_ids == plain[2]).all(-1)
    if not torch.allclose(weights[same_choice], plain[1][same_choice], rtol=1e-4):
        raise Refused("a bias on its choice changes the weights of the same choice", progress=2)
    factor = weights / score(logits.float(), kind.score_function).gather(-1, expert_ids)
    reference = factor[:1] if weights.shape[-1] == 1 else factor[:, :1]
    if torch.allclose(factor, reference.expand_as(factor), rtol=1e-4):
        return True
    if weights.shape[-1] == 1 and torch.allclose(weights, weights[:1].expand_as(weights), rtol=1e-4):
        return False
    raise Refused(f"its weights are not in proportion to the {kind.score_function} of its logits")


def _check_experts(
    output: tuple[Tensor, Tensor, Tensor],
    trial: _Trial,
    kind: RouterKind,
    bias: Float[Tensor, " experts"],
    multiplies: bool,
) -> None:
    """Raises ``Refused`` if the chosen experts are not the best by score and bias."""
    logits, _, expert_ids = output
    is_plain = not bias.any()
    # Without a slot for it, a bias is added after the expert groups have been chosen.
    is_blocked = trial.has_groups and (multiplies or kind.slot is None)
    ranked = kind.ranked(logits.float())
    choice = ranked * (1 + bias) if multiplies else ranked + bias
    best = choice.topk(expert_ids.shape[-1]).indices
    is_best = torch.equal(expert_ids.sort().values, best.sort().values)
    if not is_best and is_blocked and not is_plain:
        raise Refused("there are groups, which are chosen before the bias is added", progress=2)
    if not is_best and not trial.has_groups:
        by = f"its {kind.score_function} scores" if kind.selection == "scores" else "its logits"
        raise Refused(
            f"the experts that it chooses are not the best by {by}{'' if is_plain else ' and the bias'}",
            progress=1 if is_plain else 2,
        )
    is_large = int(bias.count_nonzero()) == 1
    if is_large and not (expert_ids == bias.argmax()).any(-1).all():
        raise Refused("a large bias does not move its choice", progress=2)


def _trial_biases(
    num_experts: int, kind: RouterKind, multiplies: bool
) -> tuple[Float[Tensor, " experts"], Float[Tensor, " experts"]]:
    """A moderate bias, and one that is large for a single expert."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, num_experts, generator=generator, dtype=torch.float32, device="cpu")
    large = torch.zeros(num_experts, device="cpu", dtype=torch.float32)
    large[num_experts // 2] = 1e30 if multiplies else 100.0  # a softmax score may be very small
    return 0.3 * kind.ranked(noise)[0], large


def discover(router: nn.Module, parent: nn.Module | None = None) -> Proof:
    """The first kind that can be proven of the router, which ``parent`` holds. Raises ``Refused`` if there is none."""
    if chooses_by_id(router):
        raise Refused("it chooses by the id of the token (a hash router), which no bias moves")
    trials = _Trials(router, parent)
    slot = _acting_slot(trials.as_is)
    refusals: list[Refused] = []
    possible: list[Proof] = []
    for kind in _kinds(slot, trials.as_is.is_dense):
        try:
            proof, is_shown = _prove(trials, kind)
        except Refused as refused:
            refusals.append(refused)
            continue
        if is_shown and proof.obstacle is None:
            return proof
        possible.append(proof)
    return _only_possible(possible, refusals)


def _acting_slot(trial: _Trial) -> str | None:
    """The one tensor beside the logits that moves the choice."""
    slots = [name for name in trial.acting if trial.by_expert[name].may_be_slot]
    return slots[0] if len(slots) == 1 else None  # if there are several, _check_slot names them


def _only_possible(possible: list[Proof], refusals: list[Refused]) -> Proof:
    """The proof of the only score function that is possible, preferably with a bias that steers."""
    if not possible:
        refused = max(refusals, key=lambda refusal: refusal.progress)
        if refused.progress == 0:
            refused = Refused(f"its weights are in proportion to none of {', '.join(SCORE_FUNCTIONS)} of its logits")
        raise refused
    possible = [proof for proof in possible if proof.obstacle is None] or possible
    functions = list(dict.fromkeys(proof.kind.score_function for proof in possible))
    if len(functions) > 1:
        raise Refused(
            f"its one weight per token is constant, so its score function may be {' or '.join(functions)}",
            "Say which by an attribute router_kind = equipoise.RouterKind(score_function, slot, selection)",
        )
    return possible[0]


def chooses_by_id(router: nn.Module) -> bool:
    """Whether it is a hash router: its forward is given the ids of the tokens."""
    return "input_ids" in _arguments(router)


def _kinds(slot: str | None, is_dense: bool) -> Iterator[RouterKind]:
    outputs: tuple[Literal["logits", "probabilities", "dense"], ...] = ("logits", "probabilities")
    for gives in ("dense",) if is_dense else outputs:
        for score_function in SCORE_FUNCTIONS:
            for selection in get_args(RouterKind.__annotations__["selection"]):
                yield RouterKind(score_function, slot, selection, gives)
