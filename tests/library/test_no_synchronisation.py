"""Nothing between two optimizer steps makes the host wait for a GPU. See ``fake_accelerator.py``."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import fake_accelerator
import pytest

CASES = [f"{s}, {case}" for s in fake_accelerator.STRATEGIES for case in ("whole", "masked", "verdict")]

CASES += ["alerts", "offloaded", "evaluation captured", "replayed"]
CASES += [f"{s}, no float64" for s in fake_accelerator.NARROW]
RAISE = {  # what must raise, and with which words
    "float64": "TypeError: no float64 on this device",
    "training captured": "EquipoiseError: a router must be counted outside a CUDA graph",
    "measuring captured": "EquipoiseError: a router must be counted outside a CUDA graph",
}
CASES += [f"{s}, two ranks, {verdict}" for s in fake_accelerator.POOLED for verdict in (False, True)]


@cache
def _found():
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "fake_accelerator.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:  # the same for every case
        return dict.fromkeys((*CASES, *RAISE, *fake_accelerator.WAITING), done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xdist_group("fake accelerator")
@pytest.mark.parametrize("case", CASES)
def test_counting_losses_gradients_and_steps_ask_nothing_of_the_device(case):
    assert _found()[case] == ""


@pytest.mark.xdist_group("fake accelerator")
@pytest.mark.parametrize("case", fake_accelerator.WAITING)
def test_the_check_sees_what_waits(case):
    assert _found()[case].splitlines()[-1:] and "fake_tensor." in _found()[case].splitlines()[-1], "nothing was raised"


@pytest.mark.xdist_group("fake accelerator")
@pytest.mark.parametrize("case", RAISE)
def test_what_the_device_cannot_do_is_said(case):
    assert RAISE[case] in _found()[case]
