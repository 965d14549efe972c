"""Trains several runs in parallel, each in a process of its own.

    parent   starts `python -m equipoise_lab.train.side_by_side PIPE` and sends the run
    child    trains; sends every call of its watcher, then its result or its error
    parent   repeats the calls on a watcher of its own, and yields the result

A child stops when it gets SIGTERM, or when the other end of its pipe is closed: like a single run, after its step and
with a checkpoint. Ctrl-C on a terminal reaches every process there. The children block it; the parent stops them.
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
from typing import Any, Protocol

import torch

from equipoise.errors import EquipoiseError
from equipoise_lab.train.config import Train
from equipoise_lab.train.loop import train
from equipoise_lab.train.run_folder import Watcher, complete_result
from equipoise_lab.train.stop import StopHandler, deferred, stop_requested

__all__ = ["Display", "Outcome", "side_by_side"]

STOPPED = 130  # exit code of a process that was stopped
CHECK_INTERVAL = 0.2  # seconds: how often the parent looks whether it was asked to stop
ANNOUNCEMENT = "stopping every run after its step, with a checkpoint; Ctrl-C again leaves at once"

Outcome = dict[str, Any] | EquipoiseError  # the result of a run, or its error


class Display(Watcher, Protocol):
    """Receives the progress of several runs."""

    def add_run(self) -> Watcher:
        """A watcher for one of several parallel runs."""


def side_by_side(
    runs: Sequence[Train], display: Display, command: str, *, workers: int, threads: int
) -> Generator[tuple[Train, Outcome]]:
    """Trains ``runs``, ``workers`` at a time with ``threads`` each. Yields each run with its outcome when it ends.

    The other runs start training after the first has started. So an error that does not depend on the run is reported
    once, and the text is in the cache. A process that dies gives an error for its run. A process that was stopped
    raises KeyboardInterrupt. However this generator ends (``close()`` included), no process remains: all get SIGTERM,
    end their step and write a checkpoint. A second Ctrl-C kills them.
    """
    waiting, active, has_begun = list(runs), dict[Any, _Process](), False
    with deferred(lambda: display.say(ANNOUNCEMENT)):
        try:
            while waiting or active:
                while waiting and len(active) < workers:
                    run, watcher = waiting.pop(0), display.add_run()
                    if (outcome := _complete(run, watcher)) is not None:
                        yield run, outcome
                        continue
                    process = _Process(run, watcher)  # loads torch while the first run starts
                    active[process.pipe] = process
                for process in list(active.values())[: None if has_begun else 1]:
                    process.begin(command, threads)
                for pipe in wait(active, CHECK_INTERVAL):
                    process = active[pipe]
                    outcome = process.receive()
                    has_begun = has_begun or process.has_begun or outcome is not None
                    if outcome is not None:
                        del active[pipe]
                        yield process.run, outcome
                if stop_requested() is not None:
                    raise KeyboardInterrupt
        finally:
            _stop(active.values())


def _complete(run: Train, watcher: Watcher) -> Outcome | None:
    try:
        return complete_result(run, watcher)
    except EquipoiseError as error:
        return error


class _ChildStopped(KeyboardInterrupt):
    """A child process was stopped."""


class _Process:
    """The child process of one run, as its parent sees it."""

    def __init__(self, run: Train, watcher: Watcher):
        self.run, self.watcher = run, watcher
        self.was_sent, self.has_begun = False, False  # whether the run was sent, and whether it has started
        self.outcome: Outcome | None = None
        self.pipe, child_pipe = Pipe()
        with child_pipe, _block_interrupts():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, str(child_pipe.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=[child_pipe.fileno()],
            )

    def begin(self, command: str, threads: int) -> None:
        """Sends the run to the child, once."""
        if not self.was_sent:
            self.was_sent = True
            with suppress(OSError):  # the child has died: receive() handles it
                self.pipe.send((self.run, command, threads))

    def receive(self) -> Outcome | None:
        """Handles one message. Returns the outcome when the child has ended, else None."""
        try:
            name, *arguments = self.pipe.recv()
        except (EOFError, OSError):  # OSError: the child died within a message
            return self._end()
        if name == "result":
            self.outcome = arguments[0]
        elif name == "error":
            if not isinstance(arguments[0], EquipoiseError):
                raise arguments[0]
            self.outcome = arguments[0]
        else:
            self.has_begun = self.has_begun or name == "begin"
            getattr(self.watcher, name)(*arguments)
        return None

    def receive_last(self) -> bool:
        """Handles one message of a child that is stopping. Returns whether it has ended; how does not matter."""
        try:
            return self.receive() is not None
        except (_ChildStopped, Exception):
            self.pipe.close()
            return True

    def _end(self) -> Outcome:
        self.pipe.close()
        code = self.process.wait()
        if code in (STOPPED, -signal.SIGTERM):
            raise _ChildStopped
        if isinstance(self.outcome, dict):
            return self.outcome
        self.watcher.end()
        if self.outcome is not None:
            return self.outcome
        return EquipoiseError(
            f"the process of a run must end by itself: the process of {self.run.label}, seed {self.run.seed}, died "
            f"with exit code {code}. Exit code -9 (SIGKILL) often means that memory ran out; --workers 1 needs less. "
            "Start the command again with --resume: it continues after the newest checkpoint."
        )


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Delays Ctrl-C until the block ends. A process started inside the block never gets it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)


def _stop(processes: Iterable[_Process]) -> None:
    active: dict[Any, _Process] = {child.pipe: child for child in processes if not child.pipe.closed}
    try:
        for child in processes:
            child.process.terminate()
        while active:  # until their last steps and checkpoints are done
            for pipe in wait(active):
                if active[pipe].receive_last():
                    del active[pipe]
        for child in processes:
            child.process.wait()
    finally:  # on a second Ctrl-C
        for child in processes:
            child.process.kill()
            child.process.wait()
            child.pipe.close()


# ---- in the child process ----


class _Sender:
    """A watcher that sends every call through a pipe."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def send(self, *message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:  # the parent is gone
            os.kill(os.getpid(), signal.SIGTERM)

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
        StopHandler(is_worker=True).install()
        run, command, threads = pipe.recv()
        threading.Thread(target=_stop_without_parent, args=[pipe], daemon=True).start()
        torch.set_num_threads(threads)
        sender = _Sender(pipe)
        try:
            sender.send("result", train(run, sender, command, says_text=False))
        except Exception as error:
            sender.send("error", _picklable(error))
    except (KeyboardInterrupt, EOFError):
        sys.exit(STOPPED)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process is ending anyway


def _stop_without_parent(pipe: Connection) -> None:
    pipe.poll(None)  # the parent sends nothing more, so this returns when the pipe is closed
    os.kill(os.getpid(), signal.SIGTERM)


def _picklable(error: Exception) -> Exception:
    """The error in a form that another process can unpickle. An unexpected error gets its traceback as a note."""
    try:
        pickle.loads(pickle.dumps(error))
        picklable = error
    except Exception:  # errors of other libraries may contain anything
        picklable = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, EquipoiseError):
        picklable.add_note("".join(traceback.format_exception(error)))
    return picklable


if __name__ == "__main__":
    _main(Connection(int(sys.argv[1])))
