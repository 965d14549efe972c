"""The losses of the balancers: their value in the forward, their gradient at the routers in the backward.

The gradient is made when a router's backward runs, from the counts pooled by then. For that a backward must find two
things: the call that it belongs to, and the factor that the caller gave the loss.

- The *call*: a counted call has an id, which autograd saves and brings back. A recomputed call has none:
  ``Window.recomputed_call`` finds it.
- The *factor*: ``Balance.loss`` returns a ticket, a scalar whose backward carries no gradient. It runs before the
  backwards of the routers, because it was made after their forwards. It records the incoming gradient: 1 /
  accumulation steps, a GradScaler's scale. If no ticket can be added to the loss, ``loss_scale`` is the factor.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers import Balancer
from equipoise.counting.biases import Biases
from equipoise.counting.window import CountedCall, MicroBatch, Window
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer
from equipoise.routers.tap import RECOMPUTED, UNCOUNTED, RouterCall
from equipoise.routing import Routing, score, score_backward, widest_float, without_autocast


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
        self.number = len(self.balancers)
        self.separates = False  # loss() was called, and so separates micro-batches
        self._loss_scale: float | Tensor | None = None

    @property
    def loss_scale(self) -> float | Tensor | None:
        """The factor of the losses if no ticket can be added; None if tickets are."""
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float | Tensor | None) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not is_number and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"loss_scale must be a finite number, a one-element tensor or None: got {value!r}.")
        self._loss_scale = value.reshape(()) if isinstance(value, Tensor) else value

    def routing(self, call: CountedCall, logits: Tensor, expert_ids: Tensor, weights: Tensor) -> Routing:
        scores = score(logits, self.layers[call.layer].kind.score_function)
        return Routing(logits, scores, expert_ids, weights, call.mask, call.sequence_ids, call.num_sequences)

    def add(self, call: CountedCall, routing: Routing) -> None:
        """Adds the losses of one call to its micro-batch, by the counts known now."""
        group, _ = self.biases.group_of[call.layer]
        for index, balancer in enumerate(group.losses):
            value = balancer.loss(routing, self._load(balancer, call))
            assert value is not None  # a balancer in ``losses`` has one
            call.micro_batch.add_loss(index, call.layer, value, call.num_tokens)

    def ticket(self, micro_batch: MicroBatch) -> Float[Tensor, ""]:
        """The balancing loss of a closed micro-batch: see ``Balance.loss``."""
        self.separates = True
        if self.number == 0:
            return torch.zeros((), device=micro_batch.vector.device)
        num_tokens = micro_batch.num_tokens.clamp_min(1)
        value = torch.zeros((), dtype=widest_float(num_tokens.device), device=num_tokens.device)
        for balancer, losses in zip(self.balancers, micro_batch.losses, strict=True):
            value = value + balancer.coefficient * (losses / num_tokens).sum()
        value = value.to(micro_batch.dtype)
        if not torch.is_grad_enabled():
            return value
        leaf = torch.zeros_like(value, requires_grad=True)
        return _Ticket.apply(leaf, value, self.window, micro_batch)

    def gradient(self, call: RouterCall, call_id: int) -> Float[Tensor, "tokens experts"]:
        """The gradient of the losses at the logits of a router call."""
        logits, expert_ids, weights = call.logits.detach(), call.expert_ids, call.weights
        if call_id == UNCOUNTED:
            return torch.zeros_like(logits)
        counted, factor = self._serve(call, call_id)
        micro_batch = counted.micro_batch
        if micro_batch is self.window.current or not self.separates:  # no loss() closed it: loss_scale stands in
            self.window.close_micro_batch()
        if micro_batch.has_several_calls(call.layer):  # the loss is a mean over all tokens of the micro-batch
            factor = factor * counted.num_tokens / micro_batch.num_tokens[call.layer].clamp_min(1)
        routing = self.routing(counted, logits, expert_ids, weights)
        score_gradient, without_closed_form = self._closed_form(counted, routing, factor)
        gradient = None
        if score_gradient is not None:
            score_function = self.layers[call.layer].kind.score_function
            gradient = score_backward(score_gradient, logits, routing.scores, score_function)
        if without_closed_form:
            logits.requires_grad_()
            with torch.enable_grad():
                routing = self.routing(counted, logits, expert_ids, weights)
                total = torch.zeros((), dtype=routing.scores.dtype, device=logits.device)
                for balancer, load in without_closed_form:
                    total = total + balancer.coefficient * balancer.loss(routing, load)
            (by_autograd,) = torch.autograd.grad(total, logits, grad_outputs=torch.ones_like(total) * factor)
            gradient = by_autograd if gradient is None else gradient + by_autograd
        assert gradient is not None  # taps ask only if there is a loss
        return gradient

    def _closed_form(
        self, call: CountedCall, routing: Routing, factor: Tensor | float
    ) -> tuple[Tensor | None, list[tuple[Balancer, Tensor | None]]]:
        """The gradient with respect to the scores of losses with a closed form; other losses, with their load."""
        score_gradient, others = None, []
        for balancer in self.biases.group_of[call.layer][0].losses:
            waits = balancer.scope == "global_batch" and balancer.pooling == "window"
            load = self._load(balancer, call, self.window.pooled_vector() if waits else None)
            with without_autocast(routing.logits.device):  # the caller's backward may run under autocast
                gradient = balancer.score_gradient(routing, load, balancer.coefficient * factor)
            if gradient is None:
                others.append((balancer, load))
            else:
                score_gradient = gradient if score_gradient is None else score_gradient + gradient
        return score_gradient, others

    def _load(
        self, balancer: Balancer, call: CountedCall, pooled_vector: Tensor | None = None
    ) -> Int[Tensor, " experts"] | None:
        """The load over a loss's scope: in a backward the pooled counts, in a forward those known by then."""
        window, layer = self.window, call.layer
        if balancer.scope in ("sequence", "token"):
            return None
        if balancer.scope == "micro_batch":
            return call.micro_batch.load(layer)
        if balancer.pooling == "window":
            return window.load_so_far(layer) if pooled_vector is None else window.layout.load(pooled_vector, layer)
        if window.last is None:  # before the first window ends: an even share
            return call.micro_batch.vector.new_ones(self.layers[layer].num_experts)
        return window.layout.load(window.last.vector, layer)

    def _serve(self, call: RouterCall, call_id: int) -> tuple[CountedCall, Tensor | float]:
        """The counted call that this backward belongs to, and the factor of its loss."""
        window, factor = self.window, self.loss_scale
        if call_id == RECOMPUTED:
            counted = window.recomputed_call(call.layer, call.expert_ids, has_factor=factor is not None)
        else:
            counted = window.call(call_id)
        if counted is not None and counted.micro_batch.factor is not None:
            factor = counted.micro_batch.factor
            if not counted.micro_batch.is_unserved(counted):
                factor = None  # this backward is a second one, without a ticket of its own
        if counted is None or factor is None:
            raise EquipoiseError(
                "balance.loss() must be added to the loss of every micro-batch, between its forward and its backward: "
                f"in the backward of {self.layers[call.layer].name} it was missing. Write `loss = model(...).loss + "
                "balance.loss()`. If it cannot be added, or the gradient is taken for some tensors only "
                "(torch.autograd.grad, backward(inputs=...), a pipeline stage, outputs with a gradient that was cached "
                "before, as by GradCache), set balance.loss_scale to the factor of the loss. A "
                "loss() is 0 before a forward, when called twice, and after a forward that raised."
            )
        counted.micro_batch.mark_served(counted, was_recomputed=call_id == RECOMPUTED)
        return counted, factor
