"""Balancing in Megatron-Core: its routers, ``attach``, and the state in its checkpoints.

    from equipoise.integrations.megatron import attach

    balance = attach(model, "lbl:scope=global_batch,coefficient=1e-2")  # a model, or the list of its chunks
    ...
    update_successful, grad_norm, num_zeros = optimizer.step()
    balance.step(applied=update_successful)

Importing this does not import Megatron-Core; calling ``attach`` does.
"""

from equipoise.integrations.megatron.attachment import attach
from equipoise.integrations.megatron.routers import ROUTER_ADAPTERS
from equipoise.integrations.megatron.state import sharded_state_dict

__all__ = ["ROUTER_ADAPTERS", "attach", "sharded_state_dict"]
