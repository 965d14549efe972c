"""A run that is stopped: it ends its step and writes a checkpoint, says where it goes on, and loses nothing."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from equipoise_lab.records import Run
from equipoise_lab.train import loop, stop
from equipoise_lab.train.checkpoint import newest_step
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare, _Run
from equipoise_lab.train.loop import train
from equipoise_lab.train.stop import StopHandler

LOGS = ("steps", "loads", "evaluations")


@pytest.fixture
def handlers():
    """The handlers of a command, for this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    StopHandler().install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signalling(new_watcher):
    """A watcher that sends the signals at the end of ``step``, before its evaluation and its checkpoint."""

    class Signalling(new_watcher):
        def __init__(self, step, *signals):
            super().__init__()
            self.when, self.signals = step, signals

        def step(self, row, tokens_per_second):
            super().step(row, tokens_per_second)
            if row["step"] == self.when:
                for number in self.signals:
                    os.kill(os.getpid(), number)

    return Signalling


def _numbers(result):
    return {name: value for name, value in result.items() if name != "tokens_per_second"}


def _records(folder):
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)] for log in LOGS]
    return rows, _numbers(Run(folder).result)


def _weights(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "model").iterdir())}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("evaluate_every", [0, 4])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tiny, new_watcher, signalling, tmp_path, handlers, number, evaluate_every
):
    """Stopped after step 8, whose evaluation is due and which is no checkpoint step."""
    whole, cut = tiny(out=tmp_path / "whole", evaluate_every=evaluate_every), tiny(evaluate_every=evaluate_every)
    train(whole, new_watcher())
    watcher = signalling(8, number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(cut, watcher)
    assert str(stopped.value) == (
        "The newest checkpoint is of step 8. To continue with step 9, run the same command with --resume."
    )
    assert [row["step"] for row in watcher.rows] == list(range(1, 9)), "it trained on"
    assert "stopping after this step, with a checkpoint; Ctrl-C again leaves at once" in watcher.said
    StopHandler().install()  # a new command
    watcher = new_watcher()
    train(dataclasses.replace(cut, resume=True), watcher)
    assert watcher.done == 8 and [row["step"] for row in watcher.rows] == [9, 10, 11, 12]
    assert _records(cut.out) == _records(whole.out)
    assert _weights(cut.out) == _weights(whole.out)


def test_a_second_ctrl_c_leaves_at_once(tiny, signalling, handlers):
    watcher = signalling(8, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(tiny(), watcher)
    assert str(stopped.value) == (
        "The newest checkpoint is of step 5. To continue with step 6, run the same command with --resume."
    )
    assert len(watcher.rows) == 8 and newest_step(tiny().out / "checkpoints") == 5


def test_a_second_signal_of_another_kind_is_from_a_parent_and_does_not_hurry(tiny, signalling, handlers):
    """`equipoise reproduce` sends SIGTERM to runs that got the Ctrl-C of the terminal too."""
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), signalling(8, signal.SIGINT, signal.SIGTERM))
    assert newest_step(tiny().out / "checkpoints") == 8


def test_before_the_first_checkpoint_the_message_says_so(tiny, signalling, handlers):
    with pytest.raises(KeyboardInterrupt, match="There is no checkpoint yet. To begin again with step 1, run the same"):
        train(tiny(), signalling(3, signal.SIGINT, signal.SIGINT))


def test_a_run_stopped_in_its_last_evaluation_keeps_every_step(tiny, new_watcher, tmp_path, handlers, monkeypatch):
    whole = tiny(out=tmp_path / "whole")
    train(whole, new_watcher())
    evaluate = loop.evaluate

    def interrupted(*arguments, **options):
        if options["split"] == "selection":
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    watcher = new_watcher()
    with pytest.raises(KeyboardInterrupt, match="All 12 steps are trained. To evaluate the model, run the same"):
        train(tiny(), watcher)
    assert "stopping after this evaluation, with a checkpoint; Ctrl-C again leaves at once" in watcher.said
    monkeypatch.undo()
    StopHandler().install()
    train(tiny(resume=True), new_watcher())
    assert _records(tiny().out) == _records(whole.out)
    assert _weights(tiny().out) == _weights(whole.out)


def test_a_comparison_of_one_worker_says_which_run_goes_on_where(tiny, signalling, handlers):
    common = {field.name: getattr(tiny(), field.name) for field in dataclasses.fields(_Run)} | {"save_model": False}
    strategies = ("none", "z", "lbl:scope=micro_batch")
    config = Compare(**{**common, "strategies": strategies, "workers": 1})

    class SecondRun(signalling):
        def begin(self, run, done):
            super().begin(run, done)
            self.signals = [signal.SIGINT] if run.strategy == "z" else []

    with pytest.raises(KeyboardInterrupt) as stopped:
        compare(config, SecondRun(7))
    assert str(stopped.value) == (
        "1 of 3 runs are complete. To continue with step 8 of z, run the same command with --resume."
    )


def test_outside_of_a_run_the_first_signal_interrupts(handlers):
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)


def test_a_signal_that_a_block_did_not_answer_interrupts_at_its_end(handlers):
    with pytest.raises(KeyboardInterrupt), stop.deferred(lambda: None):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.stop_requested() is not None


def test_a_background_job_that_ignores_ctrl_c_still_does(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    StopHandler().install()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 160])
def test_ctrl_c_in_a_terminal(tiny, tmp_path, width):
    """A pseudo terminal, whose Ctrl-C reaches the processes. All that matters is on each live line."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    config = tiny(steps=2000, strategy="loss-free:rate=1e-3+lbl:scope=sequence,coefficient=1e-4")
    values = {**config.shared(), "strategy": config.strategy, "out": config.out}
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
        if value is not None and not isinstance(value, bool)
    ]
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, width))

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "equipoise", "train", *options],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        preexec_fn=take_terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""},
    )
    os.close(child)
    shown, is_sent = b"", False
    while True:
        try:
            shown += os.read(parent, 1 << 16)
        except OSError:  # the last process has closed the terminal
            break
        if not is_sent and b" left loss " in re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown):
            os.write(parent, b"\x03")
            is_sent = True
    os.close(parent)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.wait() == 130, text
    saved = newest_step(config.out / "checkpoints")
    assert saved == len(list(Run(config.out).rows("steps"))) > 0
    said = " ".join(text.split())
    assert f"equipoise: stopped. The newest checkpoint is of step {saved}. To continue with step {saved + 1}," in said
    assert re.search(r" *\d+/2000 \d+:\d\d:\d\d left loss \d\.\d{3} loss-free:ra", text), text
    live = [line for line in re.split(r"[\r\n]+", text) if "/2000" in line]
    assert len(live) > 1 and all(len(line) <= width for line in live), live
