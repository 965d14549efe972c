"""Balancing under DeepSpeed: windows that close with the engine's steps, and DeepSpeed's own routers.

    balance = equipoise.attach(model, "loss-free:rate=1e-3")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    follow_engine(balance, engine)

This module does not import DeepSpeed. Seen with DeepSpeed 0.19.8.
"""

from typing import Any

from torch import Tensor

from equipoise.balance import Balance
from equipoise.balancers import parse_strategy
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.adapter import RouterAdapter

__all__ = ["ROUTER_ADAPTERS", "FollowedEngine", "follow_engine"]


def follow_engine(balance: Balance, engine: Any) -> "FollowedEngine":
    """Calls ``balance.step()`` after every ``engine.step()`` that ends an accumulation.

        for batch in data:
            loss = engine(**batch).loss + balance.loss()
            engine.backward(loss)
            engine.step()

    The biases move if the engine applied the step, on every rank. They stay if it skipped the step, as after an
    overflow in fp16.

    **Gradient.** Let L_m be the loss of micro-batch m, and B_m its balancing loss, coefficients included.
    ``engine.backward`` divides both by ``gradient_accumulation_steps`` = A, and DeepSpeed averages over R ranks. A step
    over micro-batches m has the gradient of ``1 / (A R) sum_m (L_m + B_m)``. ``scale_wrt_gas=False`` leaves A out for
    both.

    Args:
        balance: of the model. It may have been attached before ``deepspeed.initialize`` or after.
        engine: what ``deepspeed.initialize`` returned first.

    Returns:
        A handle, whose ``remove()`` ends that.

    Raises:
        TypeError: ``engine`` is not an engine of DeepSpeed.
        UsageError: it is one of a pipeline, or of ZenFlow; or it is followed already.
        EquipoiseError: later, from ``engine.step()``, if the backward was ``loss.backward()``. With accumulation
            DeepSpeed then divides the gradient of the model's output only, not that of ``balance.loss()``.

    Collective, as ``Balance.step``.
    """
    needed = ("backward", "step", "is_gradient_accumulation_boundary", "was_step_applied")
    if not all(hasattr(type(engine), name) for name in needed):
        raise TypeError(
            "engine must be what deepspeed.initialize returned first, which has backward, step and was_step_applied: "
            f"got {type(engine).__name__}."
        )
    if any(base.__name__ == "PipelineEngine" for base in type(engine).__mro__):
        raise UsageError(
            "the engine must run its micro-batches by engine(...) and engine.backward: a PipelineEngine runs them in "
            "train_batch, and was never tested. Use ZeRO without pipeline stages."
        )
    if getattr(engine, "zenflow", False):
        raise UsageError(
            "the engine must apply a step when step() is called: ZenFlow applies parts of it later, and was never "
            "tested. Leave zenflow out of the configuration."
        )
    if isinstance(getattr(engine.step, "__self__", None), FollowedEngine):
        raise UsageError(
            "follow_engine() must be called once for an engine: it is followed already, and a second step() would find "
            "an empty window. Remove the second call, or remove() the first."
        )
    return FollowedEngine(balance, engine)


class FollowedEngine:
    """An engine whose steps close the windows of a ``Balance``; made by ``follow_engine``."""

    def __init__(self, balance: Balance, engine: Any):
        self._balance, self._engine = balance, engine
        self._own_step, self._own_backward = engine.step, engine.backward
        self._num_backwards = 0  # of the engine, in the open window
        self._adds_loss = _may_have_loss(balance.strategy)
        engine.step, engine.backward = self._step, self._backward

    def remove(self) -> None:
        """Leaves the engine as it was."""
        for name in ("step", "backward"):
            vars(self._engine).pop(name, None)

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        self._num_backwards += 1
        return self._own_backward(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine
        self._check_backward()
        # Asked before the step: within it, the engine counts on to the next micro-batch.
        is_boundary = engine.is_gradient_accumulation_boundary() or not engine.managed_gradient_accumulation()
        scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
        scale = None if scaler is None else scaler.get_scale()
        result = self._own_step(*args, **kwargs)
        if is_boundary:
            self._num_backwards = 0
            applied = engine.was_step_applied()
            if scaler is not None:  # DeepSpeed 0.19.8 does not say that this one skipped the step
                applied = applied and scaler.get_scale() >= scale
            self._balance.step(applied=bool(applied))
        return result

    def _check_backward(self) -> None:
        num_accumulated = self._engine.gradient_accumulation_steps()
        if self._adds_loss and num_accumulated > 1 and not self._num_backwards and self._balance.has_open_window:
            raise EquipoiseError(
                "engine.backward(loss) must make the backward: this window had none, so loss.backward() was called. "
                f"DeepSpeed then divides the gradient of the model's output by gradient_accumulation_steps = "
                f"{num_accumulated}, and that of balance.loss() by nothing. Call engine.backward(loss)."
            )


def _may_have_loss(strategy: str) -> bool:
    try:
        return any(balancer.has_loss for balancer in parse_strategy(strategy))
    except UsageError:  # balancers of the user's own
        return True


# ---- routers ----


class _TopKGate(RouterAdapter):
    """The gate of ``deepspeed.moe.layer.MoE``: (loss, combine weights, dispatch mask, counts)."""

    framework = "deepspeed 0.19.8"
    remedy = (
        "Add the l_aux that its MoE layer returns to your loss, and leave the gate out with attach(where=...); or take "
        "layers of Transformers, or equipoise.nn.MoE"
    )

    def refusal(self, router: Any) -> str | None:
        return "it drops tokens beyond a capacity, and shows neither its logits nor its choice"


class _TokenChoiceTopKRouter(RouterAdapter):
    """The router of AutoEP: (weights, expert_ids, counts)."""

    framework = "deepspeed 0.19.8"
    logits_returned_by = "gate"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        assert logits is not None
        return logits, output[0], output[1]

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return weights.view(output[0].shape), *output[1:]


ROUTER_ADAPTERS: dict[str, RouterAdapter] = {
    "TopKGate": _TopKGate(),
    "TokenChoiceTopKRouter": _TokenChoiceTopKRouter(),
}
