"""Finds the layer of a router call in the open window, for losses that need it."""

import hashlib

from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.routing import Routing

__all__ = ["RouterCalls", "bytes_digest"]


class RouterCalls:
    """Finds the layer of a router call in the open window. ``Balancer.loss`` is not told the layer."""

    def __init__(self) -> None:
        self._row_of: dict[bytes, int] = {}

    def add(self, routing: Routing, row: int) -> None:
        self._row_of[self._key(routing)] = row

    def row_of(self, routing: Routing) -> int:
        row = self._row_of.get(self._key(routing))
        if row is None:
            raise EquipoiseError(
                "the lab's losses need a router call that the open window has counted: this call belongs to another "
                "window. Use them in the lab's training loop, which closes a window after its backward."
            )
        return row

    def clear(self) -> None:
        self._row_of.clear()

    @staticmethod
    def _key(routing: Routing) -> bytes:
        return bytes_digest(routing.expert_ids, routing.logits.detach().float())


def bytes_digest(*values: Tensor | int, size: int = 16) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for value in values:
        digest.update(value.cpu().contiguous().numpy().tobytes() if isinstance(value, Tensor) else b"%d" % value)
    return digest.digest()
