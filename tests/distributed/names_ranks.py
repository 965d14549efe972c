"""Three ranks that did unequally much before they attach, under every way in which torch names process groups."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from models import VOCAB, tiny_lm
from torch.distributed import distributed_c10d as c10d

import equipoise

TIMEOUT = timedelta(seconds=5)  # of our groups: ranks that do not find each other give up after it


def _named(salt: Callable[[], Any], counts_hashed: bool) -> Callable[..., str]:
    def process_group_name(ranks: list[int], use_hashed_name: bool) -> str:
        number = c10d._world.group_count
        name = hashlib.sha1(f"{ranks}_{salt()}".encode()).hexdigest() if use_hashed_name else str(number)
        c10d._world.group_count += counts_hashed or not use_hashed_name
        return name

    return process_group_name


NAMINGS: dict[str, Callable[..., str] | None] = {
    "of this torch": None,
    "by the groups that exist": _named(lambda: len(c10d._world.pg_names), counts_hashed=False),  # torch 2.9 to 2.13
    "by the groups ever made": _named(lambda: c10d._world.group_count, counts_hashed=True),  # torch 2.14
    "by a salt of each process": _named(lambda: os.urandom(8), counts_hashed=False),
}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    before = c10d._process_group_name
    c10d._process_group_name = NAMINGS[name] or before
    c10d._world.group_count = 100 * (1 + list(NAMINGS).index(name))  # what the last one left is unequal
    try:
        yield
        assert c10d._process_group_name == (NAMINGS[name] or before)
    finally:
        c10d._process_group_name = before


def _window(model: Any, balance: Any, rank: int) -> int:
    model(torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(rank))).backward()
    balance.step()
    return sum(int(load.sum()) for load in balance.load.values())


def unequal(rank: int, naming: str) -> dict[str, Any]:
    """Ranks 0 and 1 attach to a group of theirs, rank 2 makes groups of its own; then all attach, twice."""
    with _naming(naming):
        pair = dist.new_group([0, 1], timeout=TIMEOUT)
        everyone = dist.new_group(timeout=TIMEOUT, backend="cpu:gloo")
        of_pair = equipoise.attach(tiny_lm(), "none", group=pair) if rank < 2 else None
        if rank == 2:
            dist.new_group([2], use_local_synchronization=True)
        before = c10d._world.group_count
        model = tiny_lm()
        balance = equipoise.attach(model, "none", group=everyone)
        names, counts = [balance._pool.group.group_name], [_window(model, balance, rank)]
        config = [dist.get_backend_config(group) for group in (balance._pool.group, everyone)]
        balance.detach()
        if of_pair is not None:
            of_pair.detach()
        again = equipoise.attach(model, "none", group=everyone)
        names.append(again._pool.group.group_name)
        counts.append(_window(model, again, rank))
        again.detach()
        return {"names": names, "counts": counts, "made": c10d._world.group_count - before, "config": config}


def bound(rank: int) -> tuple[int, list[Any], Any]:
    """Two of three ranks attach while a device is bound: torch would split the world, with all of its ranks.

    Returns what was counted, which device was bound while the group was made, and which after it.
    """
    world, device = dist.group.WORLD, torch.device("cuda", rank)
    pair = dist.new_group([0, 1], timeout=TIMEOUT)
    if rank == 2:
        return 0, [], device
    make, seen = c10d._new_process_group_helper, []

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append((world.bound_device_id, kwargs["device_id"]))
        return make(*args, **kwargs)

    world.bound_device_id, c10d._new_process_group_helper = device, note
    try:
        model = tiny_lm()
        balance = equipoise.attach(model, "none", group=pair)
        return _window(model, balance, rank), seen, world.bound_device_id
    finally:
        world.bound_device_id, c10d._new_process_group_helper = None, make


def everything(rank: int) -> dict[str, Any]:
    return {naming: unequal(rank, naming) for naming in NAMINGS} | {"bound": bound(rank)}
