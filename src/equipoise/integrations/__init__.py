"""Balancing under the training loops of other libraries.

    from equipoise.integrations import EquipoiseCallback

    trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[EquipoiseCallback("loss-free")])

``EquipoiseCallback`` is for ``transformers.Trainer``, with or without PEFT. A loop with Accelerate needs only
``equipoise.attach``, called after ``Accelerator()``: see ``examples/accelerate_loop.py``. Modules of their own are
``lightning``, ``torchtitan``, ``megatron``, ``olmo_core``, ``automodel`` and ``deepspeed``.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["EquipoiseCallback"]

if TYPE_CHECKING:
    from equipoise.integrations.trainer import EquipoiseCallback


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'equipoise.integrations' has no attribute {name!r}")
    try:
        from equipoise.integrations import trainer
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate", "safetensors"):
            raise
        raise ImportError(
            f"{name} needs {error.name}, which is not installed: pip install 'equipoise[trainer]'."
        ) from error
    return getattr(trainer, name)


def __dir__() -> list[str]:
    return list(__all__)
