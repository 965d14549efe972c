"""The ranks of a run, one process each: how they join, act together and fail together.

Collectives of a training step time out after a minute, so that a hanging rank is noticed. Some waits are legitimately
longer: text is tokenised, a checkpoint is written. They use a second process group with a timeout of hours.
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

__all__ = ["ONE_PROCESS", "LostRank", "Ranks", "is_shared", "join_ranks", "leave_ranks"]

STEP_TIMEOUT = timedelta(seconds=60)  # how long a rank may be late within a training step
PATIENT_TIMEOUT = timedelta(hours=2)  # how long all ranks may wait for one outside of a step
START_TIMEOUT = timedelta(minutes=10)  # from the start of the first rank to the start of the last

T = TypeVar("T")
Outcome = tuple[T | None, BaseException | None]


class LostRank(EquipoiseError):
    """Another rank died, hung or stopped with an error. The run cannot continue without it."""


@final
class Ranks:
    """The ranks of a run. All of them must call the same methods in the same order.

    Attributes:
        rank, size: the rank of this process, and the number of ranks.
        local_rank: its rank on this node.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, patient: Any = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._patient = patient

    def run_on_first(self, function: Callable[..., T], *args: Any, patient: bool = True) -> T:
        """Calls ``function(*args)`` on rank 0 only. Every rank returns its value or raises its error.

        With ``patient`` the other ranks may wait for hours, else for the time of a step.
        """
        if self.size == 1:
            return function(*args)
        value: Any = None
        error: BaseException | None = None
        if self.rank == 0:
            value, error = _outcome(function, *args)
        try:
            value, error_of_first = self._broadcast((value, error and _picklable(error)), patient)
        except RuntimeError:
            if error is None:
                raise
        if error is not None or error_of_first is not None:
            raise error or error_of_first
        return value

    def _broadcast(self, value: Any, patient: bool) -> Any:
        """Rank 0's value, on every rank. The others may wait long for rank 0, but rank 0 never waits long for them."""
        limit = PATIENT_TIMEOUT if patient and self.rank else STEP_TIMEOUT
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size = torch.tensor([packed.numel()])
        dist.broadcast(size, 0, group=self._patient, async_op=True).wait(limit)
        packed = packed if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(packed, 0, group=self._patient, async_op=True).wait(limit)
        return value if self.rank == 0 else pickle.loads(packed.numpy().tobytes())

    def run_on_all(self, function: Callable[..., T], *args: Any) -> T:
        """Calls ``function(*args)`` on every rank. If it fails on any, all raise the error of the lowest such rank."""
        if self.size == 1:
            return function(*args)
        value, error = _outcome(function, *args)
        for rank, error_of_rank in enumerate(self.gather(error and _picklable(error, self.rank))):
            if error_of_rank is not None:
                raise (error if error is not None and rank == self.rank == 0 else error_of_rank)
        return value  # type: ignore[return-value]

    def run_by_node(self, function: Callable[..., T], *args: Any) -> T:
        """Calls ``function(*args)`` on the first rank of every node, then on the other ranks of the node.

        The others can use what the first one wrote to the disk of the node.
        """
        is_first = self.local_rank == 0
        value = self.run_on_all(lambda: function(*args) if is_first else None)
        if self.size > 1:
            value = self.run_on_all(lambda: value if is_first else function(*args))
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The Python values of all ranks, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._patient)
        return values

    def check_equal(self, values: Mapping[str, Any], message: Callable[[str, Any, int, Any], str]) -> None:
        """Raises the same error on every rank unless all ranks have equal ``values``.

        ``message(name, value on rank 0, other rank, its value)`` returns the text of the error.
        """
        by_rank = self.gather(dict(values))
        for rank, other_values in enumerate(by_rank):
            for name, value in by_rank[0].items():
                other_value = other_values.get(name)
                if repr(other_value) != repr(value):  # repr, because nan != nan
                    raise _mark_shared(EquipoiseError(message(name, value, rank, other_value)))

    def sum(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The sum of every figure over the ranks, in float64."""
        if self.size == 1:
            return dict(figures)
        vector = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(vector)
        return dict(zip(figures, vector.tolist(), strict=True))

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sums every tensor over the ranks, in place, with one collective per dtype."""
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
    def report_lost_rank(self, when: Callable[[], str], advice: Callable[[], str]) -> Iterator[None]:
        """Turns torch's error for a lost rank into ``LostRank``, with a message of one line."""
        try:
            yield
        except RuntimeError as error:
            reason = None if self.size == 1 else _lost_rank_reason(error)
            if reason is None:
                raise
            raise LostRank(
                f"every rank must run to the end: another rank was lost {when()} ({reason}). {advice()}"
            ) from None


ONE_PROCESS = Ranks()


def join_ranks() -> Ranks:
    """Joins the ranks that torchrun started, or uses the default process group if there is one. Else one process.

    CPU tensors use gloo. If CUDA is available, its tensors use nccl, and each rank uses the GPU with its local rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ONE_PROCESS
        _init_process_group()
    if dist.get_world_size() == 1:
        return ONE_PROCESS
    rank = dist.get_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Ranks(rank, dist.get_world_size(), local_rank, dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT))


def leave_ranks() -> None:
    """Leaves the process group that ``join_ranks`` joined, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_shared(error: BaseException) -> bool:
    """Whether every rank raised this same error."""
    return getattr(error, "of_all_ranks", False)


def _init_process_group() -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise EquipoiseError(
                f"every rank must have a GPU of its own: this node has {torch.cuda.device_count()} GPUs, and this is "
                f"local rank {local_rank}, counted from 0. Use --nproc-per-node {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        store.set(f"equipoise/here/{rank}", "1")
        # Ranks start up at different speeds: wait for all before the shorter timeout applies.
        store.wait([f"equipoise/here/{other}" for other in range(size)], START_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise EquipoiseError(
            f"all {os.environ['WORLD_SIZE']} ranks (WORLD_SIZE) must be able to connect: {_first_line(error)}. Start "
            "them with torchrun, for example: torchrun --nproc-per-node 4 -m equipoise train --out runs/one"
        ) from None


def _outcome(function: Callable[..., T], *args: Any) -> Outcome[T]:
    try:
        return function(*args), None
    except (Exception, KeyboardInterrupt) as error:
        return None, _mark_shared(error)


E = TypeVar("E", bound=BaseException)


def _mark_shared(error: E) -> E:
    """Marks an error that every rank raises."""
    error.of_all_ranks = True  # type: ignore[attr-defined]
    return error


def _picklable(error: BaseException, rank: int = 0) -> BaseException:
    """The error in a form that another process can unpickle. Its message names the rank if that is not 0."""
    if rank and isinstance(error, EquipoiseError):
        return _mark_shared(type(error)(f"on rank {rank}: {error}"))
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # errors of other libraries may contain anything
        return _mark_shared(EquipoiseError(f"on rank {rank}: {type(error).__name__}: {_first_line(error)}"))


def _lost_rank_reason(error: RuntimeError) -> str | None:
    """Why a collective failed if a rank was lost; None for other errors."""
    text = _first_line(error)
    signs = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|socket|peer"
    if not isinstance(error, dist.DistError) and not re.search(signs, text, re.IGNORECASE):
        return None
    return re.sub(r"^\[[^\]]*\]\s*", "", text).split(". ")[0].rstrip(".!")[:200]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
