"""Refuses trainings under the Trainer that could not be balanced as the user asked."""

from typing import Any

from torch import nn

from equipoise.errors import EquipoiseError, UsageError
from equipoise.integrations.trainer.hooks import ForwardHook

__all__ = ["check_only_callback", "check_training_arguments", "check_trainer_uses_model_loss"]


def check_only_callback(model: nn.Module, callback: Any) -> None:
    """Raises ``EquipoiseError`` if another callback has attached the model."""
    for hook in model._forward_hooks.values():
        if isinstance(hook, ForwardHook) and hook.callback not in (None, callback):
            raise EquipoiseError(
                "a model must have one EquipoiseCallback: another has attached it already. Give the Trainer one "
                "that names all mechanisms, as EquipoiseCallback('loss-free', 'lbl'). If the other belongs to an "
                "earlier Trainer, call detach() on it and pass the biases that it returns as biases=...."
            )


def check_training_arguments(args: Any) -> None:
    """Raises ``EquipoiseError`` for ``nn.DataParallel`` and for DeepSpeed."""
    if args.n_gpu > 1:
        raise EquipoiseError(
            f"one process must drive one GPU: got {args.n_gpu}, so the Trainer would use nn.DataParallel. It copies "
            "the model, and copies are not balanced. Start with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if getattr(args, "deepspeed", None):
        raise EquipoiseError(
            "the Trainer must run without DeepSpeed: EquipoiseCallback was never tested with it. Use DDP."
        )


def check_trainer_uses_model_loss(args: Any, model: nn.Module, trainer: Any, with_model_loss: bool) -> None:
    """Raises ``UsageError`` if the Trainer would drop the loss in the model's output, or the model adds its own."""
    option, remedy = None, ""
    if args.label_smoothing_factor > 0:
        option, remedy = f"label_smoothing_factor={args.label_smoothing_factor:g}", "Set label_smoothing_factor=0"
    elif getattr(trainer, "compute_loss_func", None) is not None:
        option, remedy = "compute_loss_func", "Leave it out"
    if option is not None:
        raise UsageError(
            "the Trainer must take its loss from the model's output, where the balancing loss is added: got "
            f"{option}, which computes another loss from the logits. {remedy}; or use a strategy without a loss "
            "(loss-free, quantile); or add callback.balance.loss() in your own compute_loss and say so with "
            "EquipoiseCallback(..., add_loss=False)."
        )
    config = getattr(model, "config", None)
    coefficient = getattr(config, "router_aux_loss_coef", 0) or 0
    if coefficient and getattr(config, "output_router_logits", False) and not with_model_loss:
        raise UsageError(
            "only one load-balancing loss must act: the model adds its own (output_router_logits with "
            f"router_aux_loss_coef={coefficient:g}) beside that of EquipoiseCallback. Set "
            "model.config.output_router_logits = False, or ask for both with with_model_loss=True."
        )
