"""The ranks whose counts are summed, and a process group of our own for them."""

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.torch_internals import is_joined_ddp_running, new_group_named


class Pool:
    """The ranks of a process group, of a ``DeviceMesh`` (all of its dimensions are pooled) or, for None, of the world.

    With its own process group no collective of ours pairs with one of DDP, FSDP or the user. It has the timeout of
    ``group``.
    """

    def __init__(self, group: Any | None = None):
        self.size, self.group = 1, None
        self.collectives, self.num_bytes = 0, 0  # begun so far, and the bytes that this rank sent
        self._made_before_init = group is None and not _is_initialised()
        if self._made_before_init:
            return
        group = dist.group.WORLD if group is None else group
        ranks = _ranks(group)
        self.size = len(ranks)
        if self.size > 1:
            existing = group.get_all_groups() if isinstance(group, dist.DeviceMesh) else [group]
            self.group = _new_group(ranks, existing)

    def check_no_rank_joined(self) -> None:
        """Raises if torch.distributed was initialised after this pool was made: it would leave the other ranks out."""
        if self._made_before_init and _is_initialised() and dist.get_world_size() > 1:
            raise EquipoiseError(
                "attach must come after torch.distributed.init_process_group (with Accelerate, after Accelerator()): "
                f"it came before, and the counts of {dist.get_world_size()} ranks would each be alone. Call detach() "
                "and attach again."
            )

    def check_no_rank_leaves(self) -> None:
        """Raises in the forward of a DDP whose ranks may leave one by one: the others would wait for them forever."""
        if self.size > 1 and is_joined_ddp_running():
            raise EquipoiseError(
                "every rank must have the same number of windows: this model is in DDP's join(), where a rank without "
                "further inputs leaves and the others would wait for its counts. Give all ranks equally many inputs "
                "(drop_last), or let all stop with the first: join(throw_on_early_termination=True). DDP stays in this "
                "mode after the block; join(enable=False) ends it."
            )

    def close(self) -> None:
        group, self.group = self.group, None
        if group is not None and _is_initialised():
            dist.destroy_process_group(group)

    def gather(self, value: Any) -> list[Any]:
        """The Python value of every rank, in rank order."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
            self.collectives += 2  # the sizes, then the values
        return values

    def agree(self, what: str, value: Any, error: Exception | None) -> list[Any]:
        """The value of every rank, in rank order; if ``what`` failed on any rank, an error on every rank."""
        message = None if error is None else f"{type(error).__name__}: {error}"
        by_rank = self.gather((value, message))
        messages = [message for _, message in by_rank]
        if error is not None and set(messages) == {message}:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise EquipoiseError(f"{what} must succeed on every rank: on rank {rank} of the group, {message}")
        return [value for value, _ in by_rank]

    def all_reduce(self, vector: Tensor) -> Any:
        """Begins to sum ``vector`` over the ranks in place. Returns what to ``wait()`` for; None on a single rank."""
        if self.group is None:
            return None
        self.collectives += 1
        self.num_bytes += vector.numel() * vector.element_size()
        return dist.all_reduce(vector, group=self.group, async_op=True)


def digest_of(value: Any) -> str:
    """A hash of nested mappings of tensors and plain values, equal on ranks that hold equal values."""
    if isinstance(value, Mapping):
        value = [(str(key), digest_of(value[key])) for key in sorted(value, key=str)]
    elif isinstance(value, Tensor):
        value = value.tolist()
    return hashlib.blake2b(repr(value).encode()).hexdigest()


def _ranks(group: Any) -> list[int]:
    ranks: list[int] = []
    if isinstance(group, dist.DeviceMesh):
        ranks = [] if group.get_coordinate() is None else group.mesh.flatten().tolist()
    elif isinstance(group, dist.ProcessGroup):
        ranks = dist.get_process_group_ranks(group)
    elif group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"group must be a process group or a DeviceMesh, as mesh['dp']: got {type(group).__name__}. For several "
            "dimensions of a mesh pass mesh['dp', 'cp']."
        )
    if dist.get_rank() not in ranks:
        raise EquipoiseError(
            "this rank must be a member of the group: it is not. Attach on the ranks of the group only."
        )
    return ranks


def _new_group(ranks: list[int], existing: list[Any]) -> Any:
    """Makes a process group; only its ``ranks`` call this. ``existing``: process groups that connect them all.

    Each rank draws a name that nobody has used, and all take the first one by the alphabet. Along several dimensions
    of a mesh it is passed on from one to the next.
    """
    name = f"equipoise-{uuid.uuid4().hex}"
    for group in existing:
        names = [name] * dist.get_world_size(group)
        dist.all_gather_object(names, name, group=group)
        name = min(names)
    return new_group_named(name, ranks, existing[0])


def _is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
