"""This process as a command: its rank under torchrun, its output and its exit. Imports no torch."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from equipoise.errors import EquipoiseError

__all__ = [
    "exit_process",
    "launcher",
    "num_ranks",
    "print_json",
    "print_stderr",
    "rank",
    "requires_lab",
    "share_cores",
]


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if num_ranks() > 1 else 0


def launcher() -> str:
    """The torchrun call in front of the command, which the run folder records; empty in a single process."""
    if num_ranks() == 1:
        return ""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks()))
    nodes = f"--nnodes {num_ranks() // ranks_per_node} " if ranks_per_node < num_ranks() else ""
    return f"torchrun {nodes}--nproc-per-node {ranks_per_node} -m "


def share_cores() -> None:
    """Lets idle OpenMP threads sleep instead of spin. Must be called before torch is imported.

    Torch's threads wait for each other thousands of times per step. By default they spin while they wait. Where other
    processes use the same cores, the spinning threads keep the one they wait for off its core, and a step takes many
    times as long. A policy that the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextlib.contextmanager
def requires_lab(command: str) -> Iterator[None]:
    """Turns the ImportError of a missing package into an error that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise EquipoiseError(
            f"`equipoise {command}` needs the lab, and {error.name} is not installed. In a clone: "
            "pip install -e '.[lab]'"
        ) from None


def print_json(content: Any) -> None:
    json.dump(content, sys.stdout, ensure_ascii=False, indent=1)
    print()


def print_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def exit_process(code: int) -> NoReturn:
    """Ends the process. One of several ranks ends at once, without Python's shutdown: there gloo waits for collectives
    that are still running, and the other ranks may be gone."""
    if num_ranks() > 1 and "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
