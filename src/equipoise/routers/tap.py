"""A tap connects one router to the observer that counts its calls and makes the gradient of its losses."""

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.routers.forward import ForwardContext
from equipoise.routers.kind import RouterKind

UNCOUNTED = -1  # id of a call that does not count: evaluation, paused
RECOMPUTED = -2  # id of a call that a backward makes again


class RouterCall(NamedTuple):
    """One call of a router, as its tap saw it."""

    layer: int
    logits: Float[Tensor, "tokens experts"]
    expert_ids: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]
    mask: Tensor | None = None  # of the model's forward, not yet fitted to these tokens
    sequence_ids: Tensor | None = None
    rows: int = 0  # of the batch; 0 if unknown
    length: int = 0  # tokens of a row of the batch; 0 if unknown
    leading: tuple[int, ...] = ()  # of the router's input, the dimensions before the last; () if it was flattened
    is_training: bool = True
    has_gradient: bool = True  # gradients were on when the forward of the model began, and are wanted now
    is_compiled: bool = False  # in a graph, where the context is not kept
    scores: Float[Tensor, "tokens experts"] | None = None  # that the router made of the logits, if they were seen
    keeps_scores: bool = False  # autograd has them, so it will not make the call again

    @property
    def num_tokens(self) -> int:
        return self.expert_ids.shape[0]


class Observer(Protocol):
    """What a tap reports to."""

    def observe(self, call: RouterCall) -> int: ...  # counts it; gives its id, which its backward brings back
    def gradient(self, call: RouterCall, call_id: int) -> Float[Tensor, "tokens experts"]: ...  # of the losses
    def add_score_gradient(self, call: RouterCall, call_id: int, onto: Tensor) -> Tensor: ...  # of the losses
    def note_detached_logits(self, layer: int) -> None: ...  # no loss reaches the router through them
    def restore_bias(self, layer: int) -> None: ...  # the slot was cast or moved: write the bias into it again
    def adopt_bias(self, layer: int) -> None: ...  # a checkpoint was loaded into the slot: take over what it holds


@dataclass(eq=False, repr=False)
class Tap:
    """Ties one router to its observer. A copy of the router is steered as it was, and never counted.

    A deep copy or a pickle carries an inert tap. A shallow copy carries this one, which is the tap of ``router`` only.
    """

    kind: RouterKind
    k: int
    layer: int = -1
    observer: Observer | None = None
    context: ForwardContext | None = None
    has_loss: bool = False
    has_slopes: bool = False  # all losses have: their gradient is known at the scores
    reads_scores: bool = False  # what is counted depends on the scores
    multiplies: bool = False  # the buffer that attach added holds w - 1; scores are multiplied by w
    router: nn.Module | None = field(default=None, init=False)  # the one whose calls it reports
    dimensions: tuple[int, ...] = (2, 3)  # of the inputs that the router was proven on
    chooses_by_max: bool = False  # the router chooses its experts one after another by maxima, not by a top-k
    argument_names: list[str] = field(default_factory=list, init=False)  # of a forward that an adapter reads
    num_experts: int = 0
    logits_hook: RemovableHandle | None = field(default=None, init=False)  # on what returns the router's logits
    ids_to_replay: Int[Tensor, "... k"] | None = field(default=None, init=False)  # [tokens, k], [batch, sequence, k]
    has_groups: bool = field(default=False, init=False)  # it chooses expert groups, whose other experts lose scores

    def __post_init__(self) -> None:
        if self.observer is not None:
            number = next(_KEYS)
            self.key = torch.tensor(number, device="cpu")
            TAPS[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        steering = (self.multiplies, self.dimensions, self.chooses_by_max, self.num_experts)
        return Tap, (self.kind, self.k, -1, None, None, False, False, False, *steering)

    def observe(self, call: RouterCall) -> int:
        return UNCOUNTED if self.observer is None else self.observer.observe(call)

    def gradient(self, call: RouterCall, call_id: int) -> Tensor:
        if self.observer is None:  # detached between forward and backward
            return torch.zeros_like(call.logits)
        return self.observer.gradient(call, call_id)

    def add_score_gradient(self, call: RouterCall, call_id: int, onto: Tensor) -> Tensor:
        return onto if self.observer is None else self.observer.add_score_gradient(call, call_id, onto)


_KEYS = itertools.count()
TAPS: "weakref.WeakValueDictionary[int, Tap]" = weakref.WeakValueDictionary()
