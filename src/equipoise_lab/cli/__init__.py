"""The command line, ``equipoise COMMAND``. Results go to stdout.

Progress goes to stderr. Exit codes: 0 success, 1 input or environment error, 2 usage error, 130 interrupted.

One module a command: its options, how they are parsed (``subcommand``) and what it does (``run``). ``parser`` lists
them. Importing this package imports no torch; each command imports what it needs when it runs.
"""

import io
import os
import shlex
import sys
import threading
import time
import traceback

import equipoise
from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cli.parser import config_file, parse, run
from equipoise_lab.cli.process import exit_process, launcher, num_ranks, print_stderr, rank
from equipoise_lab.train.stop import StopHandler, stop_requested

__all__ = ["main"]

RESUMABLE = ("train", "compare")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command ``equipoise``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _never_fail_to_print()
    _handle_signals()
    if arguments == ["--version"]:
        print(f"equipoise {equipoise.__version__}")
        return
    file = None
    try:
        file = config_file(arguments)
        run(parse(arguments, file), launcher() + shlex.join(["equipoise", *arguments]))
    except UsageError as error:
        source = "" if file is None else file.says(str(error), arguments)
        _report_and_exit(error, f"{error}{source}", 2)
    except EquipoiseError as error:
        _report_and_exit(error, str(error), 1)
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_process(1)
    except OSError as error:
        message = f"every file must be readable and writable: {error}. Fix that"
        can_resume = bool(arguments) and arguments[0] in RESUMABLE
        message += ", then continue with --resume if a run had begun." if can_resume else "."
        _report_and_exit(error, message, 1)
    except KeyboardInterrupt as stop:
        can_resume = bool(arguments) and arguments[0] in RESUMABLE
        how = "To continue, run the same command with --resume." if can_resume else "Run the same command again."
        if rank() == 0:
            print_stderr(f"equipoise: stopped. {str(stop) or how}")
        exit_process(130)
    except Exception as error:
        if _is_out_of_memory(error):
            _report_and_exit(error, "memory must suffice: it ran out. Use less text or a smaller model.", 1)
        if num_ranks() == 1:
            raise
        if rank() == 0 or not _is_shared(error):
            traceback.print_exc()
        exit_process(1)
    if num_ranks() > 1 and "equipoise_lab.train.ranks" in sys.modules:
        sys.modules["equipoise_lab.train.ranks"].leave_ranks()


def _never_fail_to_print() -> None:
    """Escapes what the encoding of a terminal or a file lacks, such as a minus sign in Latin-1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. On a CPU torch raises no error class of its own for it."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def _handle_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set handlers
    StopHandler(rank(), num_ranks()).install()


def _report_and_exit(error: Exception, message: str, code: int) -> None:
    """Prints an error once: rank 0 always, another rank only an error that rank 0 does not have.

    A usage error is in the command line, which all ranks of a node share: only the first rank of a node prints it.
    """
    is_repeated = isinstance(error, UsageError) and int(os.environ.get("LOCAL_RANK", "0")) > 0
    stop = stop_requested()
    is_consequence = stop is not None and stop.has_rank_0_stopped()
    if rank() == 0:
        print_stderr(f"equipoise: error: {message}")
    elif _is_shared(error):
        time.sleep(1)  # torchrun ends all ranks when the first one exits: rank 0 prints the error before that
    elif not is_repeated and not is_consequence:
        print_stderr(f"equipoise: rank {rank()}: error: {message}")
    exit_process(code)


def _is_shared(error: BaseException) -> bool:
    """Whether every rank raised this very error, as in ``train.ranks``, which imports torch."""
    return getattr(error, "of_all_ranks", False)
