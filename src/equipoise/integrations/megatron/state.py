"""The state of a ``Balance`` in a checkpoint of Megatron's ``dist_checkpointing``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.balance import Balance
from equipoise.integrations.megatron.attachment import group_of, of_megatron

__all__ = ["sharded_state_dict"]


def sharded_state_dict(balance: Balance, key: str = "equipoise") -> dict[str, Any]:
    """The state of a ``Balance`` for ``megatron.core.dist_checkpointing``: each layer is saved once, by its name.

        state = {"equipoise": sharded_state_dict(balance), "model": ...}
        dist_checkpointing.save(state, folder)

        state = dist_checkpointing.load(state, folder)  # into the same, made of the new model
        balance.load_state_dict(state["equipoise"])

    Another number of ranks or pipeline stages may load it.

    Args:
        balance: what ``attach`` gave.
        key: what the keys in the checkpoint begin with.
    """
    sharded: Any = of_megatron("dist_checkpointing.mapping").ShardedObject
    replica = torch.distributed.get_rank(group_of(balance.layers[0].router if balance.layers else None))

    def shard(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {name: shard(inner, f"{path}.{name}") for name, inner in value.items()}
        return sharded(path, value, (1,), (0,), replica_id=replica) if isinstance(value, Tensor) else value

    state: dict[str, Any] = shard(balance.state_dict(), key)
    return state
