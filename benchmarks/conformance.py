"""Asks every framework the questions of the conformance suite, in its newest release and in one before.

    python benchmarks/conformance.py                # all: at most half an hour; stores the answers and writes the pages
    python benchmarks/conformance.py torchtitan     # one framework; the answers of the others stay
    python benchmarks/conformance.py --page         # writes the pages from the stored answers
    python benchmarks/conformance.py --check        # fails if the pages are not what the stored answers give

Each framework has an environment of its own (tests/frameworks/environments), which is made once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conformance_pages import check_pages, write_pages
from paired import run_facts

from equipoise_lab.conformance import FRAMEWORKS
from equipoise_lab.records import read_json, write_json

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks" / "results" / "conformance.json"
ENVIRONMENT_OF = {"olmo_core_v2": "olmo_core"}
ONLY_IN_THE_NEWEST = ("olmo_core_v2",)
DRIVER_OF_BEFORE = {"torchtitan": "equipoise_lab.conformance.drivers.torchtitan_0_2:TorchTitan"}  # another interface


def python_of(environment: str) -> str:
    """The interpreter of an environment, which is made if need be."""
    command = [sys.executable, "tests/frameworks/run.py", "--python", environment]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]


def answers(framework: str, python: str) -> list[dict[str, Any]]:
    """The verdicts of the release that this interpreter has."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "equipoise", "conformance", framework, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}.")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("frameworks", nargs="*", choices=[*FRAMEWORKS, []], default=[], help="default: all")
    parser.add_argument("--page", action="store_true", help="ask nothing, write the pages")
    parser.add_argument("--check", action="store_true", help="ask nothing, fail if the pages are out of date")
    options = parser.parse_args()
    stored = read_json(STORED) if STORED.exists() else {"answers": {}, "seconds": {}}
    if options.check:
        sys.exit(check_pages(stored))
    if not options.page:
        for framework in options.frameworks or FRAMEWORKS:
            _ask(framework, stored)
            stored["facts"] = run_facts("python benchmarks/conformance.py")
            write_json(STORED, stored)
    write_pages(stored)


def _ask(framework: str, stored: dict[str, Any]) -> None:
    """Asks the releases of one framework, the newest first."""
    environment = ENVIRONMENT_OF.get(framework, framework)
    runs = [(framework, sys.executable if framework == "equipoise" else python_of(environment))]
    has_before = (ROOT / "tests" / "frameworks" / "environments" / "before" / f"{environment}.txt").exists()
    if has_before and framework not in ONLY_IN_THE_NEWEST:
        runs.append((DRIVER_OF_BEFORE.get(framework, framework), python_of(f"before/{environment}")))
    start = time.monotonic()
    by_release = {}
    for driver, python in runs:
        verdicts = answers(driver, python)
        by_release[verdicts[0]["version"]] = verdicts
    stored["answers"][framework] = by_release
    stored["seconds"][framework] = round(time.monotonic() - start)
    kinds = [verdict["kind"] for verdict in next(iter(by_release.values()))]
    print(f"{framework}: {kinds.count('right')} right, {kinds.count('wrong')} wrong, {stored['seconds'][framework]} s")


if __name__ == "__main__":
    main()
