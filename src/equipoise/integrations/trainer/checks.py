"""Refuses trainings under the Trainer that could not be balanced as the user asked."""

from typing import Any

from torch import nn

from equipoise.errors import EquipoiseError, UsageError
from equipoise.integrations.trainer.hooks import ForwardHook
from equipoise.model_loss import REMEDY, model_loss_in_config

__all__ = [
    "check_model_adds_no_loss",
    "check_only_callback",
    "check_trainer_uses_model_loss",
    "check_training_arguments",
    "refuse_model_loss",
]


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


def check_trainer_uses_model_loss(args: Any, trainer: Any) -> None:
    """Raises ``UsageError`` if the Trainer would drop the loss in the model's output."""
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


def check_model_adds_no_loss(model: nn.Module) -> None:
    """Raises ``UsageError`` if the model's config says that it adds a load-balancing loss of its own."""
    cause = model_loss_in_config(model)
    if cause is not None:
        refuse_model_loss(cause)


def refuse_model_loss(cause: str) -> None:
    raise UsageError(
        f"only one load-balancing loss must act: the model adds its own ({cause}) beside that of EquipoiseCallback. "
        f"{REMEDY} Or ask for both with with_model_loss=True."
    )
