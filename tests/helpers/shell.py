"""Runs the shell commands of a page in small: the programs that they name are found in a folder of stand-ins.

equipoise       the command itself; what trains has a tiny model and two steps
torchrun        two ranks in place of many; of two nodes both, on this machine
srun, scontrol  a cluster of one node
make            says what it would do: the target must exist
pip             says what it would install: the extras must exist
python          releases are built and checked by tests/test_wheel.py; scripts must exist
"""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pages import ROOT

__all__ = ["shell_in"]

PROGRAMS = ("equipoise", "make", "pip", "python", "scontrol", "srun", "torchrun")
SMALL = (
    "--vocab-size=300", "--steps=2", "--layers=1", "--width=32", "--experts=4", "--experts-per-token=2",
    "--expert-width=16", "--sequence-length=16", "--sequences=2", "--micro-batches=2", "--evaluation-sequences=4",
)  # fmt: skip
SMALLER = {"train": SMALL, "compare": (*SMALL, "--seeds=1", "--workers=1"), "reproduce": ("--budget=0",)}


def shell_in(folder: Path) -> Callable[[str], None]:
    """A function that runs shell code in the working directory, and raises if a command fails. Stand-ins in folder."""
    folder.mkdir()
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def shell(code: str) -> None:
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        done = subprocess.run(
            ["bash", "-e", "-c", code], env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        if done.returncode != 0:
            raise AssertionError(f"{code}exits with {done.returncode}:\n{done.stdout}{done.stderr}")

    return shell


def _equipoise(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "equipoise", *arguments, *SMALLER.get(arguments[0], ())]


def _torchrun(arguments: list[str]) -> int:
    module = arguments.index("-m")
    assert arguments[module + 1] == "equipoise"
    launcher, command = arguments[:module], arguments[module + 2 :]
    nodes = int(_value(launcher, "--nnodes", "1"))
    if nodes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _set(launcher, "--master-port", str(free.getsockname()[1]))
        _set(launcher, "--master-addr", "127.0.0.1")
    _set(launcher, "--nproc-per-node", "1" if nodes > 1 else "2")
    processes = []
    for node in range(nodes):
        if nodes > 1:
            _set(launcher, "--node-rank", str(node))
        folder = Path.cwd() if node == 0 else Path.cwd() / f"node{node}"  # no disk is shared
        folder.mkdir(exist_ok=True)
        run = [sys.executable, "-m", "torch.distributed.run", *launcher, *_equipoise(command)[1:]]
        processes.append(subprocess.Popen(run, cwd=folder))
    return max(abs(process.wait()) for process in processes)


def _value(arguments: list[str], option: str, default: str) -> str:
    return arguments[arguments.index(option) + 1] if option in arguments else default


def _set(arguments: list[str], option: str, value: str) -> None:
    arguments[arguments.index(option) + 1] = value


def _run(program: str, arguments: list[str]) -> int:
    if program == "scontrol":
        print("127.0.0.1")
    elif program == "torchrun":
        return _torchrun(arguments)
    elif program == "srun":
        return subprocess.call(arguments, env={**os.environ, "SLURM_NNODES": "1", "SLURM_NODEID": "0"})
    elif program == "python" and arguments[0] != "-m":
        return 0 if (ROOT / arguments[0]).exists() else 1
    elif program == "python":
        return 0 if arguments[1] in ("build", "twine") else 1
    elif program == "make":
        return subprocess.call(["/usr/bin/env", "-i", "PATH=/usr/bin:/bin", "make", "-n", "-C", str(ROOT), *arguments])
    elif program == "pip":
        arguments = [argument for argument in arguments if argument != "-e"]  # which needs one more package
        dry = ["--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
        return subprocess.call([sys.executable, "-m", "pip", *arguments, *dry], cwd=ROOT)
    else:
        return subprocess.call(_equipoise(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1], sys.argv[2:]))
