"""What a mutant is, and how one is judged."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """One deliberate defect: a replacement in the source that the named tests must notice."""

    what: str  # the defect; those of docs/evidence/known_defects.md begin with their number
    original: str  # stands in the source exactly once
    mutated: str
    tests: str  # a test file or folder, by the end of its path, and what else pytest is asked: "test_load -k mask"


def source_files(root: Path = ROOT) -> list[Path]:
    return sorted((root / "src").rglob("*.py"))


def places(text: str, root: Path = ROOT) -> list[Path]:
    """The source files that hold ``text``, one entry for each time."""
    return [path for path in source_files(root) for _ in range(path.read_text(encoding="utf-8").count(text))]


def find_tests(tests: str, root: Path = ROOT) -> list[Path]:
    """The test files and folders whose path ends with the first word of ``tests``."""
    wanted = "/" + tests.split()[0]
    every = [path for path in (root / "tests").rglob("*") if path.suffix == ".py" or path.is_dir()]
    return [path for path in every if str(path.with_suffix("")).endswith(wanted) and "__pycache__" not in path.parts]


def judge(mutant: Mutant) -> str:
    """``seen``, or what went wrong. Works on a copy of the repository."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        copy_repository(root)
        in_source, to_run = places(mutant.original, root), find_tests(mutant.tests, root)
        if len(in_source) != 1:
            return f"its text is in the source {len(in_source)} times"
        if len(to_run) != 1:
            return f"{mutant.tests.split()[0]} names {len(to_run)} test files"
        source = in_source[0].read_text(encoding="utf-8")
        in_source[0].write_text(source.replace(mutant.original, mutant.mutated), encoding="utf-8")
        _, _, options = mutant.tests.partition(" ")
        try:
            done = _pytest(root, f"{to_run[0]} {options}")
        except subprocess.TimeoutExpired:
            return f"HANGS in {mutant.tests}"
    if done.returncode == 1:
        return "seen"
    if done.returncode == 0:
        return f"NOT SEEN by {mutant.tests}"
    return f"pytest could not run: {(done.stdout + done.stderr)[-300:]}"


def copy_repository(root: Path) -> None:
    for name in ("src", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile", "constraints.txt", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, root / name)


def _pytest(root: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider {tests}"
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, shell=True, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
