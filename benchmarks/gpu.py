"""What a GPU alone can show: exactness, CUDA graphs, compile modes, NCCL, waiting, and what balancing costs there.

    make gpu                                               # on a machine with a GPU, at most eight minutes
    python benchmarks/gpu.py --device cpu --small          # what a CPU can run of it: runs/gpu.json, runs/gpu.md
    python benchmarks/gpu.py --page-only                   # writes docs/evidence/gpu.md from the stored result
    python benchmarks/gpu.py --check                       # fails if the page is not what the stored result gives

Writes benchmarks/results/gpu.json and docs/evidence/gpu.md after each part: a run that is cut keeps its parts. A part
runs in a process of its own with its own limit of time: what it does to the device, or a crash, reaches no other part.
Its status is `ok`, `failed` with a message, or `not run` with a reason. The exit code is 1 if a part failed.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu_costs import experts_of_transformers, overhead, own_tests
from gpu_exactness import strategies, ways
from gpu_graphs import compile_modes, graphs, pooled_counts, waits
from gpu_page import PAGE, page
from gpu_parts import FAILED, NOT_RUN, ROOT, Part, Row, Setting, status_of
from paired import run_facts

from equipoise_lab.records import read_json, write_json

STORED = ROOT / "benchmarks" / "results" / "gpu.json"
LIMIT = 480  # seconds of all parts
PARTS = (
    Part(
        "strategies",
        "Strategies",
        "Counts, values of losses, gradients and biases of every strategy are those of float64 loops.",
        70,
        strategies,
    ),
    Part(
        "ways",
        "Ways to run a step",
        "Checkpointing, compiling, autocast, loss scales and accumulation give the exact two-pass gradient.",
        110,
        ways,
    ),
    Part("waits", "Waiting", "The host waits for the GPU in no part of a step.", 45, waits),
    Part(
        "graphs",
        "CUDA graphs",
        "An evaluation can be captured, and steering follows it; the capture of a forward that counts is refused.",
        40,
        graphs,
    ),
    Part(
        "compile",
        "torch.compile",
        "Counts, losses, gradients and biases are those of eager mode; with CUDA graphs too (reduce-overhead).",
        100,
        compile_modes,
    ),
    Part("nccl", "NCCL", "Counts and statistics that NCCL sums are right.", 45, pooled_counts),
    Part("overhead", "Overhead", "What balancing adds to a step: time, kernel launches, memory.", 120, overhead),
    Part("experts", "Experts", "nn.MoE beside the experts of Transformers.", 60, experts_of_transformers),
    Part("tests", "Tests", "The project's own tests that choose a GPU where there is one pass on it.", 150, own_tests),
)


def run_in_process(part: Part, setting: Setting, seconds: float) -> tuple[list[Row], str]:
    """The rows of a part, and an error that ended it. Ignores the limit."""
    rows: list[Row] = []
    try:
        rows.extend(part.rows(setting))
    except Exception as error:
        return rows, f"{type(error).__name__}: {error}"
    return rows, ""


def part_command(part: Part, setting: Setting, rows: Path) -> list[str]:
    options = ["--device", setting.device.type, *(["--small"] if setting.small else [])]
    return [sys.executable, __file__, "--part", part.name, "--rows", str(rows), *options]


def run_isolated(part: Part, setting: Setting, seconds: float) -> tuple[list[Row], str]:
    """As ``run_in_process``, in a process that is killed after so many seconds. Its rows until then are kept."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
        path.touch()
        with log.open("w") as output:
            command = part_command(part, setting, path)
            child = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                code = child.wait(timeout=seconds)
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                error = f"its process ended with code {code}: {' '.join(lines[-3:])}" if code else ""
            except subprocess.TimeoutExpired:
                error = f"it took longer than its limit of {seconds:.0f} s"
            finally:
                end_group(child)
        complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in complete], error


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """Ends a process and those that it began."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_part(name: str, setting: Setting, path: Path) -> None:
    """Writes each row as soon as it is known."""
    (part,) = (part for part in PARTS if part.name == name)
    with path.open("a") as file:
        for row in part.rows(setting):
            file.write(json.dumps(row) + "\n")
            file.flush()


def entry(part: Part, status: str, message: str, seconds: float = 0.0, rows: Sequence[Row] = ()) -> dict[str, Any]:
    return {
        "name": part.name,
        "title": part.title,
        "shows": part.shows,
        "status": status,
        "message": message,
        "limit_seconds": part.seconds,
        "seconds": round(seconds, 1),
        "rows": list(rows),
    }


def run_all(
    setting: Setting,
    write: Callable[[dict[str, Any]], None],
    parts: Sequence[Part] = PARTS,
    run: Callable[[Part, Setting, float], tuple[list[Row], str]] = run_isolated,
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Runs all parts, and calls ``write`` with the result after each."""
    started = time.monotonic()
    entries = [entry(part, NOT_RUN, "the run ended before it") for part in parts]
    result = {**facts(setting), "limit_seconds": limit, "parts": entries}
    write(result)
    for index, part in enumerate(parts):
        begun = time.monotonic()
        left = limit - (begun - started)
        if left < 1:
            entries[index] = entry(part, NOT_RUN, f"no time was left of {limit:.0f} s")
        else:
            rows, error = run(part, setting, min(part.seconds, left))
            status, message = status_of(rows)
            if error:
                status, message = FAILED, " ".join(filter(None, (error, message if status == FAILED else "")))
            entries[index] = entry(part, status, message, time.monotonic() - begun, rows)
        print(f"{entries[index]['status']:8} {part.title}  {entries[index]['message']}", file=sys.stderr, flush=True)
        write(result)
    return result


def facts(setting: Setting) -> dict[str, Any]:
    options = f" --device {setting.device.type}{' --small' if setting.small else ''}"
    command = "make gpu" if setting.has_gpu and not setting.small else f"python benchmarks/gpu.py{options}"
    result = run_facts(command, "transformers") | {"device": setting.device.type, "small": setting.small}
    if setting.has_gpu:
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        result["hardware"] = f"{name}, {result['hardware']}"
        result["versions"] |= {"cuda": torch.version.cuda, "triton": version_of("triton")}
    return result


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def stored_page() -> str:
    return page(PARTS, read_json(STORED) if STORED.exists() else None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, help="where the result is written; the page of another than the default "
                        "is beside it")  # fmt: skip
    parser.add_argument("--page-only", action="store_true", help="only write the page from the stored result")
    parser.add_argument("--check", action="store_true", help="only compare the page with the stored result")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.page_only:
        PAGE.write_text(stored_page())
        return
    if options.check:
        if stored_page() != PAGE.read_text():
            sys.exit("docs/evidence/gpu.md must match benchmarks/results/gpu.json, and does not: run "
                     "python benchmarks/gpu.py --page-only.")  # fmt: skip
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py must run on a machine with a CUDA device: torch finds none. What a CPU can run of it: "
                 "python benchmarks/gpu.py --device cpu --small")  # fmt: skip
    setting = Setting(torch.device(options.device), options.small)
    if options.part:
        run_part(options.part, setting, options.rows)
        return
    is_whole = setting.has_gpu and not setting.small
    out = options.out or (STORED if is_whole else ROOT / "runs" / "gpu.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    page_path = PAGE if out == STORED else out.with_suffix(".md")

    def write(result: dict[str, Any]) -> None:
        write_json(out, result)
        page_path.write_text(page(PARTS, result))

    result = run_all(setting, write)
    if any(part["status"] == FAILED for part in result["parts"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
