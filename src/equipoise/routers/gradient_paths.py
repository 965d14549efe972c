"""The ways of the gradient of a loss to a router. Each finds its tap at run time, so nothing differentiable leaves the
layer and a compiled graph reads no stale state.

- ``AtScores``: if autograd keeps the scores of an eager call, a hook adds the gradient there. Their own backward is the
  rest of the formula, and nothing else is kept.
- ``EagerTap``: otherwise (activation checkpointing, offloading) a function of autograd that is the identity on the
  weights, and gives the gradient at the logits.
- Where a forward is traced, two opaque operators do the same:

    equipoise::tap            identity on the weights; counts the call, unless it runs inside a backward (recomputation)
    equipoise::tap_backward   when the backward runs: returns the gradient of the losses at the logits

  They find their tap by a key, which is a tensor. An integer would be a constant of the graph: layers compiled one by
  one would each need a graph of their own, and Dynamo refuses the ninth. The backward operator takes the incoming
  gradient as an argument. Without it the compiler may move the operator into the forward, where the pooled load is not
  known yet. An eager forward does without them: their dispatch takes as long as counting.
"""

import torch
from torch import Tensor

from equipoise.routers.tap import TAPS, UNCOUNTED, RouterCall, Tap
from equipoise.torch_internals import running_node, saved_scores


class AtScores:
    """Adds the gradient of the losses to that of the scores, before the backward goes on to the logits."""

    def __init__(self, tap: Tap, expert_ids: Tensor, call_id: int):
        self.tap, self.expert_ids, self.call_id = tap, expert_ids, call_id

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if gradient is None:
            return gradients
        by_token = gradient.reshape(-1, gradient.shape[-1])
        scores = saved_scores(running_node(), by_token)
        call = RouterCall(self.tap.layer, scores, self.expert_ids, scores, scores=scores)
        return (self.tap.add_score_gradient(call, self.call_id, by_token).reshape(gradient.shape),)


class EagerTap(torch.autograd.Function):
    """What the operators below do, without their dispatch."""

    @staticmethod
    def forward(ctx, weights, logits, expert_ids, call, tap):
        ctx.tap, ctx.needs_gradient = tap, logits.requires_grad
        ctx.call_id = tap.observe(call)
        if ctx.needs_gradient:  # the returned clone is not saved: the model may write into it
            ctx.save_for_backward(logits, expert_ids, weights)
        return weights.clone()

    @staticmethod
    def backward(ctx, grad_weights):
        grad_logits = None
        if ctx.needs_gradient:
            grad_logits = ctx.tap.gradient(RouterCall(ctx.tap.layer, *ctx.saved_tensors), ctx.call_id)
        return grad_weights, grad_logits, None, None, None


# ---- the two opaque operators ----
# They run Python, so no CUDA graph may hold them: a replay would leave it out.

torch.library.define(
    "equipoise::tap",
    "(Tensor weights, Tensor logits, Tensor expert_ids, Tensor? mask, Tensor? sequence_ids, SymInt rows, "
    "SymInt length, SymInt[] leading, Tensor key, bool training, bool has_gradient, Tensor? unique) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
torch.library.define(
    "equipoise::tap_backward",
    "(Tensor grad_weights, Tensor logits, Tensor expert_ids, Tensor weights, Tensor call_id, Tensor key) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.library.impl("equipoise::tap", "CompositeExplicitAutograd")
def _tap(weights, logits, expert_ids, mask, sequence_ids, rows, length, leading, key, training, has_gradient, unique):
    tap, call_id = TAPS.get(int(key)), UNCOUNTED
    if tap is not None:
        forward = (mask, sequence_ids, int(rows), int(length), tuple(map(int, leading)))
        modes = (training, has_gradient, unique is not None)
        call_id = tap.observe(RouterCall(tap.layer, logits, expert_ids, weights, *forward, *modes))
    return weights.clone(), torch.tensor(call_id)


@torch.library.register_fake("equipoise::tap")
def _(weights, *_):
    return torch.empty_like(weights), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.impl("equipoise::tap_backward", "CompositeExplicitAutograd")
def _tap_backward(grad_weights, logits, expert_ids, weights, call_id, key):
    tap = TAPS.get(int(key))
    if tap is None:  # its Balance is gone
        return torch.zeros_like(logits)
    return tap.gradient(RouterCall(tap.layer, logits, expert_ids, weights), call_id.item())


@torch.library.register_fake("equipoise::tap_backward")
def _(grad_weights, logits, expert_ids, weights, call_id, key):
    return torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    weights, logits, expert_ids, *_, key, _, _, _ = inputs
    ctx.needs_gradient = logits.requires_grad
    if ctx.needs_gradient:
        ctx.save_for_backward(logits, expert_ids, weights, output[1], key)


def _backward(ctx, grad_weights, grad_token):
    grad_logits = torch.ops.equipoise.tap_backward(grad_weights, *ctx.saved_tensors) if ctx.needs_gradient else None
    return grad_weights, grad_logits, *[None] * 10


torch.library.register_autograd("equipoise::tap", _backward, setup_context=_setup_context)
