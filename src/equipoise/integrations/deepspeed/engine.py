"""Windows that close with the steps of an engine of DeepSpeed."""

from typing import Any

from equipoise._text import abbreviate
from equipoise.balance import Balance
from equipoise.errors import EquipoiseError, UsageError

__all__ = ["FollowedEngine", "follow_engine"]


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
        UsageError: it is one of a pipeline, or of ZenFlow; it is followed already; or it has other routers than the
            balance, as after AutoEP.
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
    modules = set(engine.modules())
    lost = [layer.name for layer in balance.layers if layer.router not in modules]
    if lost:
        raise UsageError(
            f"the engine must hold the routers that were attached: {abbreviate(lost)} is not in it. AutoEP puts layers "
            "of its own in the place of a model's. Call attach after deepspeed.initialize."
        )
    return FollowedEngine(balance, engine)


class FollowedEngine:
    """An engine whose steps close the windows of a ``Balance``; made by ``follow_engine``."""

    def __init__(self, balance: Balance, engine: Any):
        self._balance, self._engine = balance, engine
        self._own_step, self._own_backward = engine.step, engine.backward
        self._instance_had = {name: vars(engine)[name] for name in ("step", "backward") if name in vars(engine)}
        self._num_backwards = 0  # of the engine, in the open window
        self._adds_loss = balance.has_loss
        self._is_removed = False
        engine.step, engine.backward = self._step, self._backward

    def remove(self) -> None:
        """Leaves the engine as it was. Raises ``UsageError`` if a wrapper was put around its methods since then."""
        if self._is_removed:
            return
        attributes = vars(self._engine)
        for name, ours in (("step", self._step), ("backward", self._backward)):
            if attributes.get(name) != ours:
                raise UsageError(
                    f"engine.{name} must be that of follow_engine when it is removed: something else took its place "
                    "since then. Remove that first."
                )
        for name in ("step", "backward"):
            del attributes[name]
        attributes.update(self._instance_had)
        self._is_removed = True

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
