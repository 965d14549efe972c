"""``equipoise train``: one model under one strategy. Its options are in ``train.config``."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from equipoise_lab.cli.groups import grouped
from equipoise_lab.cli.process import print_stderr, rank, requires_lab, share_cores
from equipoise_lab.train.config import Train

if TYPE_CHECKING:
    from equipoise_lab.train.watch import Terminal

__all__ = ["Train", "check_numbers", "on_rank_0", "run", "subcommand"]


def subcommand(values: Mapping[str, Any]) -> Any:
    """``values``: the defaults that a file sets, by name."""
    import tyro

    return Annotated[Train, tyro.conf.subcommand("train", constructor=grouped(Train, values))]


def run(options: Train, command_line: str) -> None:
    options.check()
    share_cores()
    with requires_lab("train"):
        from equipoise_lab.train.watch import Terminal, print_table
    check_numbers((options.strategy, options.then))
    with on_rank_0(Terminal()) as terminal:
        from equipoise_lab.train.loop import train

        train(options, terminal, command_line)
    if rank() == 0:
        from equipoise_lab.report import write_report

        page = write_report(options.out)
        print_table(options.out, stderr=True)
        print_stderr(str(page))
        print(options.out)


def on_rank_0(terminal: "Terminal") -> Any:
    """A context manager of ``terminal`` that draws on rank 0 only."""
    return terminal if rank() == 0 else contextlib.nullcontext(terminal)


def check_numbers(strategies: Iterable[str | None]) -> None:
    """Raises ``UsageError`` for a strategy with a wrong number. Imports torch, but neither the loop nor the page."""
    from equipoise_lab.train.balancers import parse_lab_strategy

    for strategy in filter(None, strategies):
        parse_lab_strategy(strategy)
