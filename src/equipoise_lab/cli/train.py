"""``equipoise train``: one model under one strategy. Its options are in ``train.config``."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

from equipoise_lab.cli.process import rank, requires_lab, share_cores
from equipoise_lab.train.config import Train

if TYPE_CHECKING:
    from equipoise_lab.train.watch import Terminal

__all__ = ["Train", "run", "on_rank_0", "subcommand"]


def subcommand() -> Any:
    import tyro

    return Annotated[Train, tyro.conf.subcommand("train")]


def run(options: Train, command_line: str) -> None:
    options.check()
    share_cores()
    with requires_lab("train"):
        from equipoise_lab.train.watch import Terminal, print_table
    with on_rank_0(Terminal()) as terminal:
        from equipoise_lab.train.loop import train

        train(options, terminal, command_line)
    if rank() == 0:
        print_table(options.out)
        print(options.out)


def on_rank_0(terminal: "Terminal") -> Any:
    """A context manager of ``terminal`` that draws on rank 0 only."""
    return terminal if rank() == 0 else contextlib.nullcontext(terminal)
