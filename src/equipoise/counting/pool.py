"""The ranks whose counts are pooled: which they are, and the collectives on a process group of our own."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.errors import EquipoiseError

__all__ = ["Pool", "digest"]


class Pool:
    """The ranks that hold different tokens, and a process group of our own over them, so that no call of ours pairs
    with one of DDP, FSDP or the user. It waits as long as the group that it was made for does.

    ``group`` is a process group, a ``DeviceMesh`` (all of its dimensions are pooled) or None, the world.
    """

    def __init__(self, group: Any | None = None):
        self.size, self.group = 1, None
        self.collectives, self.num_bytes = 0, 0  # begun so far, and what this rank gave to them
        self._before_others = group is None and not _is_initialised()
        if self._before_others:
            return
        ranks, theirs = _ranks(group), _process_groups(group)
        self.size = len(ranks)
        if self.size > 1:
            self.group = _new_group(ranks, theirs)

    def check_alone(self) -> None:
        """Raises where there are other ranks by now, of whom this pool knows nothing."""
        if self._before_others and _is_initialised() and dist.get_world_size() > 1:
            raise EquipoiseError(
                "attach must come after torch.distributed.init_process_group (with Accelerate, after Accelerator()): "
                f"it came before, and the counts of {dist.get_world_size()} ranks would each be alone. Call detach() "
                "and attach again."
            )

    def close(self) -> None:
        """Gives the process group back."""
        group, self.group = self.group, None
        if group is not None and _is_initialised():
            dist.destroy_process_group(group)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's Python value, in rank order."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
            self.collectives += 2  # the sizes, then the values
        return values

    def agree(self, what: str, value: Any, error: Exception | None) -> list[Any]:
        """Everybody's value, in rank order; or, if ``what`` failed on any rank, an error on every rank."""
        told = None if error is None else f"{type(error).__name__}: {error}"
        everyone = self.gather((value, told))
        errors = [error for _, error in everyone]
        if error is not None and set(errors) == {told}:
            raise error
        for rank, theirs in enumerate(errors):
            if theirs is not None:
                raise EquipoiseError(f"{what} must succeed on every rank: on rank {rank} of the group, {theirs}")
        return [value for value, _ in everyone]

    def all_reduce(self, vector: Tensor) -> Any:
        """Begins to sum ``vector`` over the ranks in place; ``wait()`` on what comes back, None on a single rank."""
        if self.group is None:
            return None
        self.collectives += 1
        self.num_bytes += vector.numel() * vector.element_size()
        return dist.all_reduce(vector, group=self.group, async_op=True)


def digest(value: Any) -> str:
    """A hash of nested mappings of tensors and plain values."""
    if isinstance(value, Mapping):
        value = [(str(key), digest(value[key])) for key in sorted(value, key=str)]
    elif isinstance(value, Tensor):
        value = value.tolist()
    return hashlib.blake2b(repr(value).encode()).hexdigest()


def _ranks(group: Any) -> list[int]:
    if group is None:
        return dist.get_process_group_ranks(dist.group.WORLD)
    if isinstance(group, dist.DeviceMesh):
        outside = group.get_coordinate() is None
        ranks = [] if outside else group.mesh.flatten().tolist()
    elif isinstance(group, dist.ProcessGroup):
        outside, ranks = False, dist.get_process_group_ranks(group)
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        outside, ranks = True, []
    else:
        raise TypeError(
            f"group must be a process group or a DeviceMesh, as mesh['dp']: got {type(group).__name__}. For several "
            "dimensions of a mesh pass mesh['dp', 'cp']."
        )
    if outside or dist.get_rank() not in ranks:
        raise EquipoiseError(
            "group must hold this rank: it is a group of other ranks. Attach on the ranks of the group only."
        )
    return ranks


def _process_groups(group: Any) -> list[Any]:
    """Those of torch that ``group`` is made of."""
    if isinstance(group, dist.DeviceMesh):
        return group.get_all_groups()
    return [dist.group.WORLD if group is None else group]


_FIRST_NUMBER = 4096  # of the names of our groups: more than others have groups
_number = _FIRST_NUMBER  # of our next group on this rank; never used again


def _new_group(ranks: list[int], theirs: list[Any]) -> Any:
    """A process group that only ``ranks`` make, among whom the groups ``theirs`` reach everybody.

    torch names such a group by how many groups a rank has. Ranks with unequal numbers would wait for each other under
    different names, forever, and after a group was destroyed a name comes again, and is refused. So the ranks agree on
    a number that none of them has used, and for a moment seem to have that many groups.
    """
    global _number
    for group in theirs:
        everyones = [0] * dist.get_world_size(group)
        dist.all_gather_object(everyones, _number, group=group)
        _number = max(everyones)
    names, world = dist.distributed_c10d._world.pg_names, dist.group.WORLD
    config = dist.get_backend_config(theirs[0])
    seeming = {object(): f"equipoise/{place}" for place in range(_number - len(names))}
    # with a device bound, nccl splits the world's communicator, in which the ranks outside would have to take part
    bound = getattr(world, "bound_device_id", None)
    names.update(seeming)  # type: ignore[arg-type]
    try:
        if bound is not None:
            world.bound_device_id = None
        return dist.new_group(
            ranks,
            timeout=_timeout(theirs[0]),
            backend=None if config == dist.get_backend_config(world) else config,
            use_local_synchronization=True,
        )
    finally:
        if bound is not None:
            world.bound_device_id = bound
        for place in seeming:
            names.pop(place, None)  # type: ignore[call-overload]
        _number += 1


def _is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _timeout(group: Any) -> Any:
    """How long the collectives of ``group`` wait; None, torch's own default, where its backend does not say."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None
