"""Refuses trainings under the Trainer that could not be balanced as the user asked."""

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from equipoise.errors import EquipoiseError, UsageError
from equipoise.model_loss import REMEDY, model_loss_in_config

__all__ = [
    "check_model_adds_no_loss",
    "check_only_callback",
    "check_trainer_adds_no_loss",
    "check_training_arguments",
    "check_called_by_trainer",
    "forget_callback",
    "refuse_model_loss",
    "remember_callback",
]

_CALLBACKS: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()  # by attached model


def check_only_callback(model: nn.Module, callback: Any) -> None:
    """Raises ``EquipoiseError`` if another callback has attached the model."""
    reference = _CALLBACKS.get(model)
    if reference is not None and reference() not in (None, callback):
        raise EquipoiseError(
            "a model must have one EquipoiseCallback: another has attached it already. Give the Trainer one "
            "that names all mechanisms, as EquipoiseCallback('loss-free', 'lbl'). If the other belongs to an "
            "earlier Trainer, call detach() on it and pass the biases that it returns as biases=...."
        )


def remember_callback(model: nn.Module, callback: Any) -> None:
    """Records that the callback has attached the model."""
    _CALLBACKS[model] = ref(callback)


def forget_callback(model: nn.Module) -> None:
    """The model is attached no more."""
    _CALLBACKS.pop(model, None)


def check_training_arguments(args: Any) -> None:
    """Raises ``EquipoiseError`` for ``nn.DataParallel``, and for the sequence parallelism of DeepSpeed."""
    if args.n_gpu > 1:
        raise EquipoiseError(
            f"one process must drive one GPU: got {args.n_gpu}, so the Trainer would use nn.DataParallel. It copies "
            "the model, and copies are not balanced. Start with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    parallelism = getattr(args, "parallelism_config", None)
    if getattr(parallelism, "sp_enabled", False):
        raise EquipoiseError(
            "each rank must have whole sequences: got a parallelism_config with sequence parallelism, with which "
            "EquipoiseCallback was never tested. Use ZeRO without it."
        )


def check_called_by_trainer(trainer: Any) -> None:
    """Raises ``EquipoiseError`` if there is no Trainer, to whose loss the balancing loss could be added."""
    if trainer is None:
        raise EquipoiseError(
            "EquipoiseCallback must be called by a transformers.Trainer, to whose loss it adds the balancing loss: no "
            "Trainer is on the call stack. In a loop of your own use equipoise.attach."
        )


def check_trainer_adds_no_loss(trainer: Any) -> None:
    """Raises ``UsageError`` if a trainer of TRL says that it adds the model's own load-balancing loss."""
    if getattr(trainer, "aux_loss_enabled", False):
        coefficient = getattr(trainer, "router_aux_loss_coef", None)
        refuse_model_loss(f"{type(trainer).__name__} asks for it, with router_aux_loss_coef={coefficient}")


def check_model_adds_no_loss(model: nn.Module) -> None:
    """Raises ``UsageError`` if the model's config says that it adds a load-balancing loss of its own."""
    cause = model_loss_in_config(model)
    if cause is not None:
        refuse_model_loss(cause)


def refuse_model_loss(cause: str) -> None:
    """Raises ``UsageError``: the model's own loss, switched on by ``cause``, would act beside ours."""
    raise UsageError(
        f"only one load-balancing loss must act: the model adds its own ({cause}) beside that of EquipoiseCallback. "
        f"{REMEDY} Or ask for both with with_model_loss=True."
    )
