"""Runs the tests of frameworks, each in an environment of its own.

    python tests/frameworks/run.py                 # all
    python tests/frameworks/run.py torchtitan -x   # some, with options for pytest
    python tests/frameworks/run.py --python veomni # makes an environment, and prints its interpreter
    python tests/frameworks/run.py --by-turns      # those whose turn it is today: all would take seven minutes

An environment sees the packages of the one that runs this, and adds those of ``environments/NAME.txt`` without their
dependencies: the files are complete. It is made once, and again when its file changes.
"""

import hashlib
import os
import subprocess
import sys
import sysconfig
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / "build" / "frameworks"
TURNS = (  # one a day
    ("megatron",),
    ("torchtitan",),
    ("olmo_core", "litgpt"),
    ("deepspeed",),
    ("automodel",),
    ("veomni", "transformers"),
)
AT_ONCE = 2  # frameworks; a test of two ranks takes two cores
NAMES = sorted(path.stem for path in (HERE / "environments").glob("*.txt"))


def python_of(name: str) -> Path:
    """The interpreter of a framework's environment, which is made if need be: ``megatron`` or ``before/megatron``."""
    requirements = HERE / "environments" / f"{name}.txt"
    folder, digest = ENVIRONMENTS / name, hashlib.sha256(requirements.read_bytes()).hexdigest()
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    if not stamp.exists() or stamp.read_text() != digest:
        venv.create(folder, clear=True, with_pip=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "zz_base.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own packages
        # Some frameworks forbid this version of Python in their metadata, and run on it.
        pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
        subprocess.run([*pip, "--disable-pip-version-check", "-r", requirements], check=True)
        stamp.write_text(digest)
    return python


def run(name: str, options: list[str], is_shown: bool) -> int:
    """Runs one framework's tests. Their output is shown as they run, or at their end. Returns pytest's exit code."""
    start = time.monotonic()
    python = python_of(name)
    installed = time.monotonic()
    environment = {**os.environ, "EQUIPOISE_FRAMEWORK": name, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    # What DeepSpeed compiles. Environments that share the folder compile it anew in turns, and wait for locks.
    environment["TORCH_EXTENSIONS_DIR"] = str(python.parents[1] / "torch_extensions")
    files = [
        *sorted(HERE.glob(f"test_{name}.py")),
        *sorted(HERE.glob(f"test_{name}_*.py")),
        HERE / "test_conformance.py",
    ]
    tests = [*map(str, files), "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--disable-warnings"]
    command = [python, "-m", "pytest", "-q", *tests, *options]
    output = None if is_shown else subprocess.PIPE
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
    times = f"{installed - start:.0f} s to install, {time.monotonic() - installed:.0f} s of tests"
    print(f"{done.stdout or ''}{name}: {times}, exit code {done.returncode}", flush=True)
    return done.returncode


def main() -> int:
    if sys.argv[1:2] == ["--python"]:
        print(python_of(sys.argv[2]))
        return 0
    names = [argument for argument in sys.argv[1:] if argument in NAMES] or NAMES
    options = [argument for argument in sys.argv[1:] if argument not in (*NAMES, "--by-turns")]
    if "--by-turns" in sys.argv:
        names = list(TURNS[time.gmtime().tm_yday % len(TURNS)])
        if len(names) == 1:
            options += ["-n", "2", "--dist", "loadfile"]
        others = ", ".join(name for name in NAMES if name not in names)
        print(f"frameworks by turns: today {', '.join(names)}; not today: {others}", flush=True)
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        codes = list(pool.map(lambda name: run(name, options, is_shown=len(names) == 1), names))
    failed = [name for name, code in zip(names, codes, strict=True) if code != 0]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
