"""The gradient of the balancing loss, compared with a formula by autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers import LoadBalancingLoss
from equipoise.routing import ScoreFunction
from equipoise.testing._common import NotApplicable, case, require
from equipoise.testing.routers._compare import require_close_gradients
from equipoise.testing.routers._subject import ObservedCall, Subject, count_by_hand, drain, gradients_of, run_model


def has_the_right_gradient(subject: Subject) -> None:
    """The gradient of LoadBalancingLoss at every parameter must be the gradient of coefficient * sum over layers of
    E * sum_e f_e P_e, times the factor of the loss."""
    require_loss_gradient(subject, subject.batch, subject.flipped_batch)


def require_loss_gradient(subject: Subject, *batches: dict[str, Any]) -> None:
    """One window of these micro-batches, each with another factor."""
    factors, coefficient = (0.25, 2.0), 0.5
    for scope in ("micro_batch", "global_batch"):
        plain = subject.copy()
        recorded, calls, loads, losses = subject.record(plain), [], [], []
        for batch in batches:
            run_model(plain, batch)
            calls.append(drain(recorded))
            all_calls = [call for layer_calls in calls[-1].values() for call in layer_calls]
            if any(call.chooses_all_experts or not call.has_graph for call in all_calls):
                raise NotApplicable  # the loss has no gradient, or the logits were recorded without theirs
            mask = batch.get("attention_mask")
            loads.append({name: count_by_hand(layer_calls, mask) for name, layer_calls in calls[-1].items()})
        for batch, batch_calls, batch_loads, factor in zip(batches, calls, loads, factors, strict=True):
            for name, (_, kind) in subject.routers(plain).items():
                pooled = torch.stack([load[name] for load in loads]).sum(0)
                load = batch_loads[name] if scope == "micro_batch" else pooled
                loss = _loss_by_formula(batch_calls[name], kind.score_function, load, batch.get("attention_mask"))
                losses.append(factor * coefficient * loss)
        torch.stack(losses).sum().backward()
        model, balance = subject.attached(LoadBalancingLoss(coefficient, scope=scope))
        total: Tensor | float = 0.0
        for batch, factor in zip(batches, factors, strict=True):
            _, task_loss = run_model(model, batch)
            total = total + 0 * task_loss + factor * balance.loss()
        assert isinstance(total, Tensor)
        total.backward()
        dtypes = [call.logits.dtype for by_layer in calls for layer_calls in by_layer.values() for call in layer_calls]
        with case(scope=scope, factors=factors, coefficient=coefficient):
            require_close_gradients(gradients_of(model), gradients_of(plain), dtypes)


def _loss_by_formula(
    calls: Sequence[ObservedCall], score_function: ScoreFunction, load: Int[Tensor, " experts"], mask: Tensor | None
) -> Float[Tensor, ""]:
    """E * sum_e f_e P_e in float64."""
    require(all(call.logits.requires_grad for call in calls), "logits without a gradient")
    z = torch.cat([call.logits for call in calls]).double()
    if score_function == "softmax":
        s = (z - z.logsumexp(-1, keepdim=True)).exp()
    elif score_function == "sigmoid":
        s = 1 / (1 + (-z).exp())
    else:
        s = (1 + z.exp()).log().sqrt()
    p = s / s.sum(-1, keepdim=True)
    is_counted = torch.ones_like(p[:, 0]) if mask is None else (mask.reshape(-1) != 0).to(p).repeat(len(calls))
    mean_score = (p * is_counted[:, None]).sum(0) / is_counted.sum()
    share = load.to(p) / load.sum().to(p)
    return load.numel() * (share * mean_score).sum()
