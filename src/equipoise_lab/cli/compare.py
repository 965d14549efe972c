"""``equipoise compare``: the same model under several strategies. Its options are in ``train.config``."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from equipoise_lab.cli.groups import grouped
from equipoise_lab.cli.process import print_json, rank, requires_lab, share_cores
from equipoise_lab.cli.train import check_numbers, on_rank_0
from equipoise_lab.train.config import Compare

__all__ = ["Compare", "run", "subcommand"]


def subcommand(values: Mapping[str, Any]) -> Any:
    """``values``: the defaults that a file sets, by name."""
    import tyro

    return Annotated[Compare, tyro.conf.subcommand("compare", constructor=grouped(Compare, values))]


def run(options: Compare, command_line: str) -> None:
    options.check()
    share_cores()
    with requires_lab("compare"):
        from equipoise_lab.train.watch import Terminal, print_table
    check_numbers((*options.strategies, options.then))
    with on_rank_0(Terminal(num_runs=len(options.runs()))) as terminal:
        from equipoise_lab.train.compare import compare

        results, failure = compare(options, terminal, command_line)
    if results and rank() == 0:
        print_table(options.out, stderr=options.json)
        print(options.out / "report.html", file=sys.stderr)
    if options.json and rank() == 0:
        print_json(results)
    if failure is not None:
        raise failure
