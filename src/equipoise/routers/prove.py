"""Finds out by experiment how a router selects: its own forward, on a stand-in with random weights.

Every way in which a router may select is tried on the stand-in until one is proven. A router for which none can be
proven is refused with the reason. So a family is known by its behaviour, and one that changes its behaviour is
refused, never miscounted.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.routers.adapter import FORMS, RouterAdapter
from equipoise.routers.block_trial import BlockTrial
from equipoise.routers.blocks import BlockAdapter
from equipoise.routers.kind import RouterKind, Slot
from equipoise.routers.outputs import CONTRACT, LEAVE_OUT, Refused, forward_arguments
from equipoise.routers.stand_in import RandomTensors
from equipoise.routers.steering import BiasedTopK
from equipoise.routers.trial import K_ATTRIBUTES, Trial
from equipoise.routing import SCORE_FUNCTIONS, score


class Proof(NamedTuple):
    """What was proven of a router."""

    kind: RouterKind
    num_experts: int
    k: int
    dimensions: tuple[int, ...] = (2, 3)  # of the inputs that it was proven on: [tokens, dim], [batch, sequence, dim]
    obstacle: str | None = None  # why no bias steers it; the rest is proven
    chooses_by_max: bool = False  # its experts one after another, by maxima and not by a top-k
    replay_obstacle: str | None = None  # why no recorded choice can take the place of its own
    has_groups: bool = False  # that are chosen first, and no slot: other experts lose the scores that are the weights


def find_slot(router: nn.Module, parent: nn.Module | None, kind: RouterKind) -> Slot | None:
    if kind.slot is None:
        return None
    *path, name = kind.slot.split(".")
    holder = router.get_submodule(".".join(path))
    is_inside = name in holder._buffers or name in holder._parameters
    return Slot(holder if is_inside or parent is None else parent, name)


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
    adapter = None if isinstance(kind.gives, str) else kind.gives
    return _prove(_Trials(router, parent, adapter), kind, multiplies)[0]


class _Trials:
    """The trials of one router, each made when it is needed."""

    def __init__(self, router: nn.Module, parent: nn.Module | None, adapter: RouterAdapter | None):
        self.router, self.parent, self.adapter, self.random = router, parent, adapter, RandomTensors()

    def _trial(self) -> type[Trial]:
        return BlockTrial if isinstance(self.adapter, BlockAdapter) else Trial

    @cached_property
    def as_is(self) -> Trial:
        return self._trial()(self.router, self.parent, self.random, self.adapter)

    @cached_property
    def top_2(self) -> Trial | None:
        """With k = 1 the weight may be 1 whatever the score function: with k = 2 the weights show it."""
        if all(getattr(self.router, name, None) != 1 for name in K_ATTRIBUTES):
            return None
        try:
            return self._trial()(self.router, self.parent, self.random, self.adapter, top_k=2)
        except Refused:  # its forward is made for k = 1
            return None


def _prove(trials: _Trials, kind: RouterKind, multiplies: bool = False) -> tuple[Proof, bool]:
    """A proof, and whether anything but the choice shows the score function."""
    trial = trials.as_is
    if trial.adapter is None and (trial.read_by is FORMS["dense"]) != (kind.gives == "dense"):
        raise Refused(f"its forward does not return what gives={kind.gives!r} says", CONTRACT)
    _check_slot(trial, kind.slot)
    if trial.router.training:
        runs = (trial.run_plain(trial.inputs[0], kind.slot), trial.run(trial.inputs[0], kind.slot))
        if not all(map(torch.equal, *(trial.read(kind, run) for run in runs))):
            what_to_do = "Call eval() before attach, and train() after"
            raise Refused("it gives another result each time that it runs in training", what_to_do, progress=3)
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
    by_max, has_groups = (value and kind.slot is None for value in (trial.chooses_by_max, trial.has_groups))
    hidden = next(hidden for hidden in trial.inputs if hidden.dim() in dimensions)
    top_k = BiasedTopK(None, False, by_max, trial.num_experts, has_groups=has_groups, num_maxima=trial.num_maxima)
    replay_obstacle = _replay_obstacle(trial, hidden, kind, top_k)
    steered = (obstacle, by_max, replay_obstacle, has_groups)
    return Proof(kind, trial.num_experts, trial.k, dimensions, *steered), is_shown


def _check_slot(trial: Trial, slot: str | None) -> None:
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


def _check(trial: Trial, hidden: Tensor, kind: RouterKind, multiplies: bool) -> tuple[str | None, bool]:
    """Raises ``Refused`` if the router does not select as ``kind`` says. Gives what keeps a bias from steering it, and
    whether the weights show the score function."""
    plain = trial.read(kind, trial.run_plain(hidden, kind.slot))
    zero = torch.zeros(trial.num_experts, device="cpu", dtype=torch.float32)
    is_shown = _check_weights(plain, plain, kind)
    _check_experts(plain, trial, kind, zero, multiplies)
    if any(name != kind.slot for name in trial.by_expert):  # what else has a number for each expert must not choose
        other = trial.read(kind, trial.run_plain(hidden, kind.slot, is_neutral=False))
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
    if kind.slot is not None and not multiplies and trial.has_groups:
        return _check_groups(trial, hidden, kind, plain), is_shown
    return None, is_shown


def _check_groups(trial: Trial, hidden: Tensor, kind: RouterKind, plain: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Why no bias can steer a router with expert groups; None if the same bias on all experts changes no choice."""
    bias = torch.full((trial.num_experts,), -2 * float(kind.ranked(plain[0].float()).abs().max()), device="cpu")
    expert_ids = trial.read(kind, trial.run(hidden, kind.slot, bias))[2]
    if torch.equal(expert_ids.sort().values, plain[2].sort().values):
        return None
    return (
        "an expert outside the chosen expert groups gets the score 0 and is chosen, if those inside have negative "
        "scores with their biases"
    )


def _check_bias(
    trial: Trial,
    hidden: Tensor,
    kind: RouterKind,
    bias: Float[Tensor, " experts"],
    multiplies: bool,
    plain: tuple[Tensor, Tensor, Tensor],
) -> bool:
    """Raises ``Refused`` if a bias does not steer the router, or does more. Whether the weights show the scores."""
    if kind.slot is None or multiplies:
        top_k = BiasedTopK(bias, multiplies, trial.chooses_by_max, num_maxima=trial.num_maxima)
        with top_k:
            returned = trial.run(hidden, kind.slot)
        output = trial.read(kind, returned)
        num_choices = top_k.num_choices / trial.runs
        if num_choices != 1:
            raise Refused(_why_unsteered(int(num_choices)), progress=2)
    else:
        output = trial.read(kind, trial.run(hidden, kind.slot, bias))
    is_shown = _check_weights(output, plain, kind)
    _check_experts(output, trial, kind, bias, multiplies)
    return is_shown


def _replay_obstacle(trial: Trial, hidden: Tensor, kind: RouterKind, top_k: BiasedTopK) -> str | None:
    """Why a recorded choice cannot take the place of the router's own; None if it can, with the scores as weights."""
    plain = trial.read(kind, trial.run_plain(hidden, kind.slot))
    record = plain[2].roll(1, 0)  # each token has the experts of another: of as many groups as it may have
    top_k.recorded = record
    with top_k:
        returned = trial.run(hidden, kind.slot)
    output = trial.read(kind, returned)
    if top_k.num_choices != trial.runs:
        return _why_unsteered(top_k.num_choices // trial.runs)
    if not torch.equal(output[2].sort().values, record.sort().values):
        return "it does not take the experts that its top-k gives"
    try:
        _check_weights(output, output, kind)
    except Refused as refused:
        return str(refused)
    return None


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
    trial: Trial,
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


def discover(router: nn.Module, parent: nn.Module | None = None, adapter: RouterAdapter | None = None) -> Proof:
    """The first kind that can be proven of the router, which ``parent`` holds. Raises ``Refused`` if there is none."""
    if adapter is not None and (reason := adapter.refusal(router)) is not None:
        raise Refused(reason, adapter.remedy)
    if chooses_by_id(router):
        raise Refused("it chooses by the id of the token (a hash router), which no bias moves")
    trials = _Trials(router, parent, adapter)
    slot = _acting_slot(trials.as_is)
    refusals: list[Refused] = []
    possible: list[Proof] = []
    for kind in _kinds(slot, trials.as_is):
        try:
            proof, is_shown = _prove(trials, kind)
        except Refused as refused:
            refusals.append(refused)
            continue
        if is_shown and proof.obstacle is None:
            return proof
        possible.append(proof)
    return _only_possible(possible, refusals)


def _acting_slot(trial: Trial) -> str | None:
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
    return "input_ids" in forward_arguments(router)


def _kinds(slot: str | None, trial: Trial) -> Iterator[RouterKind]:
    outputs: tuple[Any, ...] = ("logits", "probabilities")
    if trial.adapter is not None:
        outputs = (trial.adapter,)
    elif trial.read_by is FORMS["dense"]:
        outputs = ("dense",)
    for gives in outputs:
        for score_function in SCORE_FUNCTIONS:
            for selection in get_args(RouterKind.__annotations__["selection"]):
                yield RouterKind(score_function, slot, selection, gives)
