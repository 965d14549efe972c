"""How many operations and bytes balancing adds: exact on any machine, so a test holds them."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "operations.py"
STORED = PROGRAM.parent / "results" / "operations.json"
SIZES = ("layers", "experts", "k", "rows", "step_limit", "bytes_limit", "calls")


def test_the_stored_counts_are_those_of_this_source(tmp_path):
    """In a process of its own: an accelerator that exists in Python only stays there."""
    path = tmp_path / "operations.json"
    subprocess.run([sys.executable, str(PROGRAM), "--out", str(path)], capture_output=True, timeout=300, check=True)
    found, stored = (json.loads(file.read_text(encoding="utf-8")) for file in (path, STORED))
    assert {key: found[key] for key in SIZES} == {key: stored[key] for key in SIZES}


def test_no_count_is_beyond_its_limit_but_those_that_are_known():
    beyond = set()
    for row in json.loads(STORED.read_text(encoding="utf-8"))["calls"]:
        for part in ("forward", "backward"):
            if row[f"{part}_limit"] is not None and row[part] > row[f"{part}_limit"]:
                beyond.add((row["strategy"], row["mask"], row["fused"]))
    assert beyond == {("lbl:scope=sequence", "int64", False)}
