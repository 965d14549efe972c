"""An interrupt is never lost, wherever it comes."""

import signal
import subprocess
import sys

import pytest

from equipoise_lab.train import stop
from equipoise_lab.train.stop import StopHandler

PROGRAM = """
import os, signal, sys, time
from equipoise_lab.train.stop import repeat_lost_interrupts

signal.signal(signal.SIGTERM, signal.default_int_handler)
{install}

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the handler runs here
            pass

class Broken:
    def __del__(self):
        raise ValueError("ours")

try:
    Broken()
    Held()
    time.sleep(2)
except KeyboardInterrupt:
    sys.exit(42)
"""


def _run(install):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(install=install)], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_interrupt_inside_del_is_raised_again():
    done = _run("repeat_lost_interrupts(); repeat_lost_interrupts()")
    assert done.returncode == 42
    assert "KeyboardInterrupt" not in done.stderr
    assert "ValueError: ours" in done.stderr  # other exceptions are reported as before


def test_without_it_python_ignores_the_interrupt():
    done = _run("")
    assert done.returncode == 0
    assert "KeyboardInterrupt" in done.stderr


@pytest.fixture
def alarms(monkeypatch):
    """The clock of the module in a list of one, and the seconds of every alarm that is set."""
    now, alarms = [100.0], []
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop.signal, "setitimer", lambda timer, seconds: alarms.append(seconds))
    return now, alarms


@pytest.mark.parametrize(
    ("rank", "is_in_step", "seconds"), [(0, False, 2), (1, False, 3), (0, True, 25), (1, True, 26)]
)
def test_a_rank_goes_on_for_a_grace_period_and_rank_0_leaves_first(alarms, rank, is_in_step, seconds):
    now, set_alarms = alarms
    handler = StopHandler(rank, 2)
    handler.announce = (lambda: None) if is_in_step else None
    handler(signal.SIGINT, None)
    assert set_alarms == [seconds]
    now[0] += 0.9
    handler(signal.SIGINT, None)  # torchrun repeats the signal of the terminal
    handler(signal.SIGTERM, None)
    now[0] += 0.2
    handler(signal.SIGTERM, None)  # and ends its ranks
    assert set_alarms == [seconds]
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)  # a second Ctrl-C
    assert not handler.has_rank_0_stopped()
    now[0] += seconds - 1.5
    assert handler.has_rank_0_stopped() == (rank > 0)


def test_ctrl_c_twice_leaves_at_once_after_a_signal_of_another_kind_too():
    handler = StopHandler()
    handler.announce = lambda: None
    handler(signal.SIGTERM, None)
    handler(signal.SIGINT, None)  # may be the same Ctrl-C, which a parent passes on
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)


def test_a_worker_leaves_its_block_once_and_then_takes_no_signal():
    handler = StopHandler(is_worker=True)
    said = []
    handler.announce = lambda: said.append("stopping")
    for _ in range(3):
        handler(signal.SIGTERM, None)
    assert handler.requested_at is not None and not said
