"""The processes of a run, one a rank: who they are, and how they act and fail as one.

Collectives of a training step wait for a minute, so that a rank which hangs is noticed. What a rank may rightly wait
for longer (text that is tokenised, a checkpoint that is written) goes over a group of its own that has hours.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist

from equipoise.errors import EquipoiseError

__all__ = ["ALONE", "LostRank", "Ranks", "is_shared", "meet", "part"]

STEP = timedelta(seconds=60)  # what a rank may be late within a training step
PATIENCE = timedelta(hours=2)  # what all may wait for one, outside of it
MEETING = timedelta(minutes=10)  # from the first rank's start to the last's

T = TypeVar("T")
Outcome = tuple[T | None, BaseException | None]


class LostRank(EquipoiseError):
    """Another rank died, hung or stopped with an error of its own; nothing can go on without it."""


@final
class Ranks:
    """The ranks of a run, all of which call the same methods in the same order.

    Attributes:
        rank, size: the number of this process, and how many there are.
        local_rank: its number on this node.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, patient: Any = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._patient = patient

    def first(self, function: Callable[..., T], *args: Any, patient: bool = True) -> T:
        """What ``function(*args)`` returns on rank 0, on every rank; what it raises there is raised on every rank."""
        if self.size == 1:
            return function(*args)
        value: Any = None
        error: BaseException | None = None
        if self.rank == 0:
            value, error = _outcome(function, *args)
        try:
            value, told = self._hand_out((value, error and _portable(error)), patient)
        except RuntimeError:
            if error is None:
                raise
        if error is not None or told is not None:
            raise error or told
        return value

    def _hand_out(self, value: Any, patient: bool) -> Any:
        """Rank 0's value, on every rank. They may wait long for rank 0, which never waits long for them."""
        limit = PATIENCE if patient and self.rank else STEP
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size = torch.tensor([packed.numel()])
        dist.broadcast(size, 0, group=self._patient, async_op=True).wait(limit)
        packed = packed if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(packed, 0, group=self._patient, async_op=True).wait(limit)
        return value if self.rank == 0 else pickle.loads(packed.numpy().tobytes())

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` on every rank; where it fails on any, the first of these errors is raised on all."""
        if self.size == 1:
            return function(*args)
        value, error = _outcome(function, *args)
        for rank, theirs in enumerate(self.gather(error and _portable(error, self.rank))):
            if theirs is not None:
                raise (error if error is not None and rank == self.rank == 0 else theirs)
        return value  # type: ignore[return-value]

    def by_node(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` on the first rank of every node, then on the others of the node: what the first leaves
        on the disk, the others find there."""
        is_first = self.local_rank == 0
        built = self.together(lambda: function(*args) if is_first else None)
        opened = self.together(lambda: built if is_first else function(*args)) if self.size > 1 else built
        return opened  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Everybody's Python value, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._patient)
        return values

    def agree(self, values: Mapping[str, Any], say: Callable[[str, Any, int, Any], str]) -> None:
        """Raises the same error on every rank unless all have equal ``values``: ``say(name, on rank 0, rank, there)``
        makes its message."""
        everyone = self.gather(dict(values))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if repr(theirs.get(name)) != repr(value):  # nan is nan
                    raise _share(EquipoiseError(say(name, value, rank, theirs.get(name))))

    def sum(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Every figure summed over the ranks, in float64."""
        if self.size == 1:
            return dict(figures)
        vector = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(vector)
        return dict(zip(figures, vector.tolist(), strict=True))

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sums every tensor over the ranks, in place: one collective a dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            of_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in of_dtype])
            dist.all_reduce(flat)
            for tensor, total in zip(of_dtype, flat.split([tensor.numel() for tensor in of_dtype]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The mean of every figure over the ranks."""
        return {name: value / self.size for name, value in self.sum(figures).items()}

    @contextmanager
    def alive(self, when: Callable[[], str], what_then: Callable[[], str]) -> Iterator[None]:
        """Says in one line, as ``LostRank``, what torch makes of a rank that is no longer there."""
        try:
            yield
        except RuntimeError as error:
            reason = None if self.size == 1 else _lost(error)
            if reason is None:
                raise
            raise LostRank(
                f"every rank must live to the end: another one was lost {when()} ({reason}). {what_then()}"
            ) from None


ALONE = Ranks()


def meet() -> Ranks:
    """The ranks that torchrun started, or those of the default process group where one is there; else one process.

    CPU tensors go over gloo; where CUDA is available its tensors go over nccl, each rank on the GPU of its number on
    the node.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        _join()
    if dist.get_world_size() == 1:
        return ALONE
    rank = dist.get_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Ranks(rank, dist.get_world_size(), local_rank, dist.new_group(backend="gloo", timeout=PATIENCE))


def part() -> None:
    """Leaves the process group that ``meet`` joined, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_shared(error: BaseException) -> bool:
    """Whether every rank raised this very error."""
    return getattr(error, "of_all_ranks", False)


def _join() -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise EquipoiseError(
                f"every rank must have a GPU of its own: this node has {torch.cuda.device_count()}, this is its rank "
                f"{local_rank}, counted from 0. Start it with --nproc-per-node {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        store.set(f"equipoise/here/{rank}", "1")
        store.wait([f"equipoise/here/{other}" for other in range(size)], MEETING)  # they load at their own pace
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
    except (RuntimeError, ValueError) as error:
        raise EquipoiseError(
            f"the {os.environ['WORLD_SIZE']} ranks of WORLD_SIZE must find each other: {_first_line(error)}. Start "
            "them with torchrun, as in: torchrun --nproc-per-node 4 -m equipoise train --out runs/one"
        ) from None


def _outcome(function: Callable[..., T], *args: Any) -> Outcome[T]:
    try:
        return function(*args), None
    except (Exception, KeyboardInterrupt) as error:
        return None, _share(error)


E = TypeVar("E", bound=BaseException)


def _share(error: E) -> E:
    error.of_all_ranks = True  # type: ignore[attr-defined]
    return error


def _portable(error: BaseException, rank: int = 0) -> BaseException:
    """The error as another process can read it; one of another rank than 0 says whose it is."""
    if rank and isinstance(error, EquipoiseError):
        return _share(type(error)(f"on rank {rank}: {error}"))
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever an error of another library holds
        return _share(EquipoiseError(f"on rank {rank}: {type(error).__name__}: {_first_line(error)}"))


def _lost(error: RuntimeError) -> str | None:
    """Why a collective failed, if it is that a rank is gone; else None."""
    text = _first_line(error)
    signs = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|socket|peer"
    if not isinstance(error, dist.DistError) and not re.search(signs, text, re.IGNORECASE):
        return None
    return re.sub(r"^\[[^\]]*\]\s*", "", text).split(". ")[0].rstrip(".!")[:200]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
