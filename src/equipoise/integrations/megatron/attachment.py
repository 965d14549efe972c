"""``attach`` for Megatron-Core: it knows the process groups and the scale of the loss."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.attachment import attach as attach_to_any
from equipoise.attachment import resolve
from equipoise.balance import Balance
from equipoise.balancers import Balancer, LoadBalancingLoss
from equipoise.counting.start import BiasesOrPath
from equipoise.errors import EquipoiseError

__all__ = ["attach", "group_of", "of_megatron"]


def attach(
    model: nn.Module | Sequence[nn.Module],
    *balancers: Balancer | str,
    where: Callable[[str, nn.Module], bool] | None = None,
    biases: BiasesOrPath | None = None,
    fused: bool = False,
) -> Balance:
    """Attaches balancers to a model of Megatron-Core, or to this rank's part of one.

        balance = attach(model, "loss-free:rate=1e-3")
        update_successful, grad_norm, num_zeros = optimizer.step()
        balance.step(applied=update_successful)

    It is ``equipoise.attach``, and knows three things of Megatron:

    - The *group* is its tensor, context and data parallel group (``tp_dp_cp``): with sequence parallelism all of them
      have different tokens. Expert parallel ranks are among them. Pipeline stages are not: they have other layers.
    - No loss is added to yours. The gradient of the balancing loss gets the scale that Megatron gives its own auxiliary
      loss, ``MoEAuxLossAutoScaler.set_loss_scale``, which its ``forward_backward_*`` functions call: 1 / number of
      micro-batches, times the scale of ``config.grad_scale_func``. So the loss is its coefficient times a mean over
      the micro-batches of the global batch. Within a micro-batch every token weighs the same, on whichever tensor or
      context parallel rank it is. With ``calculate_per_token_loss`` it is a mean over all tokens of the global batch.
    - A *pipeline stage* may be without MoE layers. Layers have the numbers that they have in the whole model.

    Args:
        model: the model, or the list of chunks that an interleaved pipeline has; before or after
            ``DistributedDataParallel`` and ``Float16Module``, before ``forward_backward_*`` runs.
        balancers: mechanisms, as objects or strategy strings.
        where: as of ``equipoise.attach``.
        biases: likewise.
        fused: likewise.

    Returns:
        One ``Balance`` for all chunks.

    Raises:
        EquipoiseError: as ``equipoise.attach``; before ``initialize_model_parallel``; and for a loss of scope
            ``sequence`` if tensor or context parallel ranks hold parts of sequences.

    A loop that does not use ``forward_backward_*`` adds ``balance.loss()`` to its loss, or calls
    ``MoEAuxLossAutoScaler.set_loss_scale``. Without both the backward raises.
    """
    if not _parallel_state().model_parallel_is_initialized():
        raise EquipoiseError(
            "attach must run after megatron.core.parallel_state.initialize_model_parallel(), which makes the process "
            "groups: it has not been called. Without Megatron's groups, use equipoise.attach(model, ..., group=...)."
        )
    router_class = of_megatron("transformer.moe.router").TopKRouter
    chunks = [_unwrapped(chunk) for chunk in (model if isinstance(model, Sequence) else [model])]
    whole = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    router = next((m for m in whole.modules() if isinstance(m, router_class)), None)
    if router is not None:
        _check_sequences(router, balancers)
    has_stages = _parallel_state().get_pipeline_model_parallel_world_size() > 1
    options: dict[str, Any] = {"where": where, "group": group_of(router), "biases": biases, "fused": fused}
    balance = attach_to_any(whole, *balancers, allow_empty=has_stages, **options)
    if router is not None:
        balance.loss_scale = _LossScale(router)
    return balance


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside Megatron's wrappers."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def of_megatron(name: str) -> Any:
    """A module of Megatron-Core."""
    try:
        return import_module(f"megatron.core.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("megatron", "megatron.core"):
            raise
        raise ImportError(
            "equipoise.integrations.megatron needs Megatron-Core, which is not installed: pip install megatron-core."
        ) from error


def _parallel_state() -> Any:
    return of_megatron("parallel_state")


def group_of(router: Any | None) -> Any:
    """The process group whose ranks have different tokens of a router; of this pipeline stage if it has no router."""
    if router is not None:
        return router.tp_dp_cp_group
    return _parallel_state().get_tensor_and_data_parallel_group(with_context_parallel=True)


def _check_sequences(router: Any, balancers: Sequence[Balancer | str]) -> None:
    """Raises for a loss within sequences if no rank has a whole one."""
    num_parts = router.tp_cp_group.size()
    if num_parts > 1 and any(isinstance(b, LoadBalancingLoss) and b.scope == "sequence" for b in resolve(balancers)):
        raise EquipoiseError(
            f"a loss of scope sequence must have each sequence on one rank: {num_parts} tensor and context parallel "
            "ranks hold a part of each. Take scope micro_batch or global_batch."
        )


class _LossScale:
    """The factor of a micro-batch's balancing loss, by the scale that Megatron's schedule set for auxiliary losses."""

    def __init__(self, router: Any):
        self.is_per_token = bool(router.calculate_per_token_loss)
        self.group = router.tp_cp_group  # its ranks have parts of the same sequences
        self.scaler: Any = of_megatron("transformer.moe.moe_utils").MoEAuxLossAutoScaler

    def __call__(self, num_tokens: Tensor) -> Tensor:
        """``num_tokens``: of the micro-batch, on this rank."""
        scale = self.scaler.main_loss_backward_scale
        if scale is None:
            raise EquipoiseError(
                "Megatron must set the scale of its auxiliary losses before a backward, as its forward_backward_* "
                "functions do: it did not. In a loop of your own add balance.loss() to the loss of each micro-batch, "
                "or call MoEAuxLossAutoScaler.set_loss_scale with the factor of its loss."
            )
        if self.is_per_token:  # all gradients will be divided by the tokens of the global batch
            return scale.double() * num_tokens
        if self.group.size() == 1:
            return scale.clone()  # Megatron writes the next one into the same tensor
        # Gradients are summed over these ranks, and the scale has a factor that undoes their mean over context ranks.
        of_all_parts = num_tokens.clone()
        torch.distributed.all_reduce(of_all_parts, group=self.group)
        return scale.double() * num_tokens / of_all_parts.clamp_min(1)
