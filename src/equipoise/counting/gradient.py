"""The losses of the balancers: their value in the forward, their gradient at the routers in the backward.

The gradient is made when a router's backward runs, from the counts pooled by then. For that a backward must find two
things: the call that it belongs to, and the factor that the caller gave the loss.

- The *call*: a counted call has an id, which autograd saves and brings back. A recomputed call has none:
  ``Window.recomputed_call`` finds it.
- The *factor*: by what the caller multiplied the loss, such as 1 / accumulation steps or a GradScaler's scale.
  ``Balance.loss`` returns a ticket, a scalar that carries no gradient to the model. Its backward runs before those of
  the routers, because it was made after their forwards, and its incoming gradient is the factor. If no ticket can be
  added to the loss, ``loss_scale`` is the factor, or a function that gives it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers import Balancer
from equipoise.counting.biases import Biases
from equipoise.counting.call import CountedCall
from equipoise.counting.layout import outside_inference_mode
from equipoise.counting.loss_sums import Counts, LossSums
from equipoise.counting.window import MicroBatch, Window
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer
from equipoise.routers.tap import RECOMPUTED, UNCOUNTED, RouterCall
from equipoise.routing import Routing, score, score_backward
from equipoise.torch_internals import autograd_on

LossScale = float | Tensor | Callable[[Tensor], float | Tensor]


class _Ticket(torch.autograd.Function):
    """A scalar whose backward tells the window which factor the loss was given."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, window: Window, micro_batch: MicroBatch) -> Tensor:
        ctx.window, ctx.micro_batch = window, micro_batch
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.window.begin_backward(ctx.micro_batch, grad)
        return None, None, None, None


class Losses:
    """The losses of one attached model."""

    def __init__(self, layers: Sequence[MoELayer], biases: Biases, window: Window):
        self.layers = layers
        self.biases = biases
        self.window = window
        self.balancers = biases.groups[0].losses if biases.groups else []
        self.num_losses = len(self.balancers)
        self._waits = any(b.scope == "global_batch" and b.pooling == "window" for b in self.balancers)
        self.separates = False  # loss() was called, and so separates micro-batches
        self._loss_scale: LossScale | None = None

    @property
    def loss_scale(self) -> LossScale | None:
        """The factor of the losses if no ticket can be added, or a function that gives it; None if tickets are."""
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, value: LossScale | None) -> None:
        must = "loss_scale must be a finite number, a one-element tensor, a function of the number of tokens, or None"
        self._loss_scale = value if value is None or callable(value) else _checked_factor(value, must)

    @torch.no_grad()
    def _factor_without_ticket(self, micro_batch: MicroBatch) -> Tensor | float | None:
        """``loss_scale``, or what it gives for this micro-batch. It is asked once for each: it may use collectives."""
        if not callable(self._loss_scale):
            return self._loss_scale
        if micro_batch.loss_scale is None:
            factor = self._loss_scale(micro_batch.fewest_tokens())
            must = "the function loss_scale must give a finite number or a one-element tensor"
            micro_batch.loss_scale = _checked_factor(factor, must)
        return micro_batch.loss_scale

    def routing(self, call: CountedCall, routed: RouterCall) -> Routing:
        """What a counted call decided, for the balancers."""
        logits, scores, mask, sequences = routed.logits, routed.scores, call.mask, call.sequences
        if scores is None:
            scores = score(logits, self.layers[call.layer].kind.score_function)
        routing = Routing(logits, scores, routed.expert_ids, routed.weights, None if mask is None else mask.numbers)
        if sequences is None:
            return routing
        return routing._replace(sequence_ids=sequences.ids, num_sequences=sequences.num_sequences)

    def add(self, call: CountedCall, routing: Routing) -> None:
        """Adds the losses of one call to its micro-batch."""
        micro_batch = call.micro_batch

        def load_of_call(balancer: Balancer) -> Tensor | None:
            return self._load(balancer, call, self.window.counts_so_far(micro_batch))

        self._sums(micro_batch).add(call, routing, load_of_call)

    def values(self, micro_batch: MicroBatch) -> Float[Tensor, "losses layers"]:
        """The losses of a closed micro-batch, without coefficients: means over its tokens, by the counts then known."""
        assert micro_batch.sums is not None and micro_batch.counts is not None
        with outside_inference_mode():
            return micro_batch.sums.values(micro_batch.counts)

    @torch.no_grad()
    def _value(self, micro_batch: MicroBatch) -> Float[Tensor, ""]:
        total = torch.stack(
            [b.coefficient * v.sum() for b, v in zip(self.balancers, self.values(micro_batch), strict=True)]
        )
        assert micro_batch.sums is not None
        return total.sum().to(micro_batch.sums.dtype)

    def ticket(self, micro_batch: MicroBatch) -> Float[Tensor, ""]:
        """The balancing loss of a closed micro-batch: see ``Balance.loss``."""
        self.separates = True
        if self.num_losses == 0:
            return torch.zeros((), device=micro_batch.vector.device)
        value = self._value(micro_batch)
        if not torch.is_grad_enabled():
            return value
        leaf = torch.zeros_like(value, requires_grad=True)
        return _Ticket.apply(leaf, value, self.window, micro_batch)

    # ---- backward ----

    def add_score_gradient(
        self, routed: RouterCall, call_id: int, onto: Float[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        """The gradient of the losses at the scores of a router call, added to ``onto``. Only if all have slopes."""
        served = None if call_id == UNCOUNTED else self._serve(routed, call_id)
        if served is None:
            return onto
        counted, factor = served
        sums, counts = self._sums(counted.micro_batch), self._counts(counted.micro_batch)
        return sums.add_gradient(counted, self.routing(counted, routed), factor, counts, onto)

    def gradient(self, routed: RouterCall, call_id: int) -> Float[Tensor, "tokens experts"]:
        """The gradient of the losses at the logits of a router call."""
        logits = routed.logits
        served = None if call_id == UNCOUNTED else self._serve(routed, call_id)
        if served is None:
            return torch.zeros_like(logits)
        counted, factor = served
        routing = self.routing(counted, routed)
        counts = self._counts(counted.micro_batch)
        at_scores = self._sums(counted.micro_batch).gradient(counted, routing, factor, counts)
        by_autograd = self._by_autograd(counted, routed, factor)
        if at_scores is None:
            assert by_autograd is not None  # taps ask only if there is a loss
            return by_autograd
        score_function = self.layers[routed.layer].kind.score_function
        gradient = score_backward(at_scores.expand_as(routing.scores), logits, routing.scores, score_function)
        return gradient if by_autograd is None else gradient + by_autograd

    def _sums(self, micro_batch: MicroBatch) -> LossSums:
        assert micro_batch.sums is not None  # there is a loss
        return micro_batch.sums

    def _by_autograd(
        self, call: CountedCall, routed: RouterCall, factor: Tensor | float
    ) -> Float[Tensor, "tokens experts"] | None:
        """The gradient of the losses without slopes."""
        without_slopes = [b for b in self.biases.group_of[call.layer][0].losses if not b.has_slopes]
        if not without_slopes:
            return None
        micro_batch, counts = call.micro_batch, self._counts(call.micro_batch)
        is_differentiated = _is_differentiated(routed)
        if micro_batch.has_several_calls(call.layer):  # the loss is a mean over all tokens of the micro-batch
            factor = factor * call.num_tokens / micro_batch.num_tokens(call.layer).clamp_min(1)
        with autograd_on():
            logits = routed.logits if is_differentiated else routed.logits.detach().requires_grad_()
            routing = self.routing(call, routed._replace(logits=logits))
            total = torch.zeros((), dtype=routing.scores.dtype, device=logits.device)
            for balancer in without_slopes:
                total = total + balancer.coefficient * balancer.loss(routing, self._load(balancer, call, counts))
            grad_outputs = torch.ones_like(total) * factor
            (gradient,) = torch.autograd.grad(total, logits, grad_outputs, create_graph=is_differentiated)
        return gradient

    def _counts(self, micro_batch: MicroBatch) -> Counts:
        """The counts known now. Waits for those of other ranks, if a loss needs them."""
        counts = micro_batch.counts
        assert counts is not None  # it was closed
        return counts._replace(pooled=self.window.pooled_vector()) if self._waits else counts

    def _load(self, balancer: Balancer, call: CountedCall, counts: Counts) -> Int[Tensor, " experts"] | None:
        """The counts over the scope of a loss without slopes, for one layer."""
        if balancer.scope in ("sequence", "token"):
            return None
        group, row = self.biases.group_of[call.layer]
        return counts.over_scope(balancer, group)[row]

    def _serve(self, routed: RouterCall, call_id: int) -> tuple[CountedCall, Tensor | float] | None:
        """The counted call that this backward belongs to, and the factor of its loss.

        None if there is nothing to add: in the backward of a gradient, which goes through the router again (a second
        derivative). Raises ``EquipoiseError`` if no ``loss()`` was added.
        """
        window = self.window
        if call_id == RECOMPUTED:
            has_factor = self.loss_scale is not None
            counted = window.recomputed_call(routed.layer, routed.expert_ids, has_factor)
        else:
            counted = window.call(call_id)
        factor: Tensor | float | None = None
        if counted is not None:
            is_unserved = counted.micro_batch.is_unserved(counted)
            if not is_unserved and counted.has_differentiable_gradient:
                return None
            if counted.micro_batch.factor is None:
                factor = self._factor_without_ticket(counted.micro_batch)
            elif is_unserved:
                factor = counted.micro_batch.factor  # else this backward is a second one, without a ticket of its own
        if counted is None or factor is None:
            raise EquipoiseError(
                "balance.loss() must be added to the loss of every micro-batch, between its forward and its backward: "
                f"in the backward of {self.layers[routed.layer].name} it was missing. Write `loss = model(...).loss + "
                "balance.loss()`. If it cannot be added, or the gradient is taken for some tensors only "
                "(torch.autograd.grad, backward(inputs=...), a pipeline stage, outputs with a gradient that was cached "
                "before, as by GradCache), set balance.loss_scale to the factor of the loss. A "
                "loss() is 0 before a forward, when called twice, and after a forward that raised."
            )
        counted.has_differentiable_gradient = _is_differentiated(routed)
        micro_batch = counted.micro_batch
        micro_batch.mark_served(counted, was_recomputed=call_id == RECOMPUTED)
        if micro_batch is self.window.current or not self.separates:  # no loss() closed it: loss_scale stands in
            self.window.close_micro_batch()
        return counted, factor


def _is_differentiated(routed: RouterCall) -> bool:
    """Whether the gradient that is made now will be differentiated again: the backward is one with create_graph."""
    return torch.is_grad_enabled() and routed.logits.requires_grad


def _checked_factor(value: Any, must: str) -> float | Tensor:
    """A finite number or a 0-d tensor. Raises ``ValueError``, which begins with ``must``, for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number:
        raise ValueError(f"{must}: got {value!r}.")
    return float(value)
