"""Runs side by side, each in a process of its own.

    side_by_side   starts `python -m equipoise_lab.train.side_by_side PIPE`, and sends the run
    the process    trains, and sends what its watcher is told, then its result or its error
    side_by_side   tells a watcher here, and gives the result

A process stops, as a run alone does, when it gets SIGTERM, or when nobody holds the other end of its pipe any more.
Ctrl-C on a terminal reaches every process there: those of runs do not see it, the one that began them stops them.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch

from equipoise.errors import EquipoiseError
from equipoise_lab.train.config import Train
from equipoise_lab.train.loop import train
from equipoise_lab.train.run_folder import Watcher, complete_result

__all__ = ["Display", "Outcome", "side_by_side"]

STOPPED = 130  # how a process ends that was told to

Outcome = dict[str, Any] | EquipoiseError  # a result, or why there is none


class Display(Watcher, Protocol):
    """Who is told how several runs go on."""

    def another(self) -> Watcher:
        """The watcher of one of several runs side by side."""


def side_by_side(
    runs: Sequence[Train], display: Display, command: str, *, workers: int, threads: int
) -> Generator[tuple[Train, Outcome]]:
    """Trains ``runs``, ``workers`` at a time with ``threads`` each, and gives each with its outcome when it ends.

    The others begin when the first has begun: an error that does not depend on the run comes once, and the text is in
    the cache. A process that dies is an error of its run; one that was told to stop is a KeyboardInterrupt. However
    this ends, by ``close()`` too, no process is left: they are told to stop, and killed on a second Ctrl-C.
    """
    waiting, under_way, begun = list(runs), dict[Any, _Process](), False
    try:
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                run, watcher = waiting.pop(0), display.another()
                if (outcome := _complete(run, watcher)) is not None:
                    yield run, outcome
                    continue
                process = _Process(run, watcher)  # it loads torch while the first begins
                under_way[process.pipe] = process
            for process in list(under_way.values())[: None if begun else 1]:
                process.begin(command, threads)
            for pipe in wait(under_way) if under_way else ():  # of nothing it would wait for ever
                process = under_way[pipe]
                outcome = process.listen()
                begun = begun or process.began or outcome is not None
                if outcome is not None:
                    del under_way[pipe]
                    yield process.run, outcome
    finally:
        _stop(under_way.values())


def _complete(run: Train, watcher: Watcher) -> Outcome | None:
    try:
        return complete_result(run, watcher)
    except EquipoiseError as error:
        return error


class _Process:
    """The process of one run, as the one that began it sees it."""

    def __init__(self, run: Train, watcher: Watcher):
        self.run, self.watcher, self.asked, self.began = run, watcher, False, False
        self.outcome: Outcome | None = None
        self.pipe, theirs = Pipe()
        with theirs, _interrupts_wait():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=[theirs.fileno()],
            )

    def begin(self, command: str, threads: int) -> None:
        """Has it train, unless it was asked to before."""
        if not self.asked:
            self.asked = True
            with suppress(OSError):  # it died already: see listen
                self.pipe.send((self.run, command, threads))

    def listen(self) -> Outcome | None:
        """Takes one message; the outcome if it was the last."""
        try:
            name, *given = self.pipe.recv()
        except (EOFError, OSError):  # OSError: it died within a message
            return self._end()
        if name == "result":
            self.outcome = given[0]
        elif name == "error":
            if not isinstance(given[0], EquipoiseError):
                raise given[0]
            self.outcome = given[0]
        else:
            self.began = self.began or name == "begin"
            getattr(self.watcher, name)(*given)
        return None

    def _end(self) -> Outcome:
        self.pipe.close()
        code = self.process.wait()
        if code in (STOPPED, -signal.SIGTERM):
            raise KeyboardInterrupt
        if self.outcome is not None:
            return self.outcome
        return EquipoiseError(
            f"the process of a run must end by itself: that of {self.run.label}, seed {self.run.seed}, did not, its "
            f"exit code is {code}. If memory ran out, as -9 (SIGKILL) often means, --workers 1 needs less. Start the "
            "command again with --resume: it goes on after the newest checkpoint."
        )


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits until this is over, and a process begun within never sees it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(processes: Iterable[_Process]) -> None:
    try:
        for one in processes:
            one.process.terminate()
            one.pipe.close()
        for one in processes:
            one.process.wait()
    finally:  # a second Ctrl-C: at once
        for one in processes:
            one.process.kill()
            one.process.wait()


# ---- in the process of a run ----


class _Sender:
    """A watcher that sends on what it is told."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def send(self, *message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:  # nobody is there any more
            _told()

    def say(self, text: str) -> None:
        self.send("say", text)

    def begin(self, config: Train, done: int) -> None:
        self.send("begin", config, done)

    def step(self, row: dict[str, Any], tokens_per_second: float) -> None:
        self.send("step", row, tokens_per_second)

    def end(self) -> None:
        self.send("end")


def _main(pipe: Connection) -> None:
    try:
        signal.signal(signal.SIGTERM, _told)
        run, command, threads = pipe.recv()
        threading.Thread(target=_stop_when_alone, args=[pipe], daemon=True).start()
        torch.set_num_threads(threads)
        sender = _Sender(pipe)
        try:
            sender.send("result", train(run, sender, command))
        except Exception as error:
            sender.send("error", _portable(error))
    except (KeyboardInterrupt, EOFError):
        sys.exit(STOPPED)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends: nothing is left to stop


def _told(number: int = signal.SIGTERM, frame: FrameType | None = None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt from None


def _stop_when_alone(pipe: Connection) -> None:
    pipe.poll(None)  # nothing comes any more: it can only end
    os.kill(os.getpid(), signal.SIGTERM)


def _portable(error: Exception) -> Exception:
    """The error as another process can read it; one that is no EquipoiseError says where it was raised."""
    try:
        pickle.loads(pickle.dumps(error))
        portable = error
    except Exception:  # whatever an error of another library holds
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, EquipoiseError):
        portable.add_note("".join(traceback.format_exception(error)))
    return portable


if __name__ == "__main__":
    _main(Connection(int(sys.argv[1])))
