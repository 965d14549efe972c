"""Balancing under ``transformers.Trainer``.

callback      EquipoiseCallback: what happens at each event of a training
attaching     which routers are attached; biases that stay fixed
loss          adds the balancing loss to the model's output, weighted as the Trainer weights its loss
checkpoints   the state beside the Trainer's checkpoints
checks        what is refused, with the reason
hooks, stack  how a callback gets at what no event tells it
"""

from equipoise.integrations.trainer.callback import EquipoiseCallback

__all__ = ["EquipoiseCallback"]
