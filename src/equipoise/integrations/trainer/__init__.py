"""Balancing under ``transformers.Trainer`` and the trainers of TRL.

callback      EquipoiseCallback: what happens at each event of a training
attaching     which routers are attached; biases that stay fixed
loss          wraps compute_loss: adds the balancing loss, weighed as the Trainer weighs its loss
forwards      how the Trainer's loss uses the losses that the model returns
num_items     who divides by num_items_in_batch
checkpoints   the state beside the Trainer's checkpoints
checks        what is refused, with the reason
hooks, stack  how a callback gets at what no event tells it
"""

from equipoise.integrations.trainer.callback import EquipoiseCallback

__all__ = ["EquipoiseCallback"]
