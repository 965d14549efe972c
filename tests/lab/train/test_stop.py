"""An interrupt is never lost, wherever it comes."""

import subprocess
import sys

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
