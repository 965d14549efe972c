"""What does `equipoise audit` cost? Time against bare forwards, and memory against the number of tokens.

    python benchmarks/audit.py    # writes benchmarks/results/audit.json

The model is the lab's default model after two steps. The text is the packaged corpus. Three targets:

- The command on 100,000 tokens, from start to end of its process: at most 60 s of wall clock on two cores.
- The work of an audit without loading (text, tokens, forwards, counts, statistics) over the bare forwards of the same
  batches: at most 1.2, the median over pairs. Both run in one process, in turn.
- Peak memory with 400,000 tokens over peak memory with 50,000: at most 1.05, medians of three processes each.

The last line on stdout is the result as JSON.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded: its threads must not spin on shared cores

import torch
from torch import nn

from equipoise_lab.audit.command import audit, load_tokenizer
from equipoise_lab.audit.config import Audit
from equipoise_lab.audit.run import audit_model
from equipoise_lab.experts.result import summarise
from equipoise_lab.models.load import load_model
from equipoise_lab.records import write_json

STORED = Path(__file__).parent / "results" / "audit.json"
TOKENS, PAIRS, THREADS = 100_000, 5, 2
FEW, MANY, PROCESSES = 50_000, 400_000, 3  # the peak varies by a twentieth between processes
MOST_SECONDS, MOST_RATIO, MOST_GROWTH = 60.0, 1.2, 1.05


class SilentProgress:
    def say(self, text: str) -> None: ...

    def done(self, tokens: int, of: int) -> None: ...


def run_command(*arguments: str) -> float:
    """Runs `equipoise` once and returns the seconds it took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "equipoise", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


class Pair:
    """An audit, and the bare forwards of the same batches."""

    def __init__(self, run: Path, data: str | None = None, tokens: int = TOKENS, length: int = 512):
        self.model: nn.Module = load_model(run / "model", require_all_weights=True).model.eval()
        self.tokenizer, self.data, self.tokens, self.length = load_tokenizer(run / "model"), data, tokens, length
        self.batches: list[torch.Tensor] = []
        hook = self.model.register_forward_pre_hook(
            lambda model, args, kwargs: self.batches.append(kwargs["input_ids"]), with_kwargs=True
        )
        self.audit_seconds()
        hook.remove()

    def audit_seconds(self) -> float:
        started = time.perf_counter()
        counts = audit_model(
            self.model,
            lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            self.data,
            SilentProgress(),
            tokens=self.tokens,
            length=self.length,
            end=self.tokenizer.eos_token_id,
        )
        summarise(counts, lambda token_id: self.tokenizer.decode([token_id]))
        return time.perf_counter() - started

    @torch.no_grad()
    def bare_seconds(self) -> float:
        """Seconds of the forwards alone."""
        started = time.perf_counter()
        for ids in self.batches:
            self.model(input_ids=ids, use_cache=False)
        return time.perf_counter() - started

    def measure(self, pairs: int = PAIRS) -> dict[str, Any]:
        seconds = []
        for pair in range(pairs):
            if pair % 2:  # every other pair runs in reverse order
                bare = self.bare_seconds()
                seconds.append((self.audit_seconds(), bare))
            else:
                seconds.append((self.audit_seconds(), self.bare_seconds()))
        ratios = [audit / bare for audit, bare in seconds]
        return {
            "tokens": sum(ids.numel() for ids in self.batches),
            "pairs": pairs,
            "audit_seconds": round(statistics.median(audit for audit, _ in seconds), 3),
            "bare_seconds": round(statistics.median(bare for _, bare in seconds), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        }


def peak(run: Path, tokens: int, data: str = "corpus", length: int = 512) -> dict[str, Any]:
    """Peak memory of this process, after one audit of ``tokens`` tokens."""
    with tempfile.TemporaryDirectory() as out:
        result = audit(Audit(run, data, tokens, Path(out), sequence_length=length), SilentProgress())
    return {"tokens": sum(result["tokens"].values()), "peak_mib": round(peak_mib(), 1)}


def peak_mib() -> float:
    """Peak resident memory of this process so far. ``ru_maxrss`` would start from the parent's peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _peak_in_new_processes(run: Path, tokens: int) -> dict[str, Any]:
    """The median over processes that do nothing else."""
    command = [sys.executable, __file__, "--peak", str(tokens), "--run", str(run)]
    rows = []
    for _ in range(PROCESSES):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    peaks = [row["peak_mib"] for row in rows]
    return {"tokens": rows[0]["tokens"], "peak_mib": statistics.median(peaks), "peaks_mib": sorted(peaks)}


def table(result: dict[str, Any]) -> str:
    command, pair, memory = result["command_time"], result["over_bare_forwards"], result["peak_memory"]
    rows = [
        ("", "measured", "target", "met"),
        (
            f"command, {command['tokens']:,} tokens",
            f"{command['seconds']} s",
            f"{MOST_SECONDS:.0f} s",
            command["holds"],
        ),
        (f"over bare forwards, {pair['tokens']:,} tokens", pair["ratio"], MOST_RATIO, pair["holds"]),
        (
            f"peak memory, {memory['many']['tokens']:,} over {memory['few']['tokens']:,} tokens",
            f"{memory['many']['peak_mib']} / {memory['few']['peak_mib']} MiB = {memory['growth']}",
            MOST_GROWTH,
            memory["holds"],
        ),
    ]
    return "\n".join(f"{name:44} {measured!s:32} {target!s:8} {is_met}" for name, measured, target, is_met in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=int, help="run one audit of this many tokens and print the peak memory")
    parser.add_argument("--run", type=Path, help="audit the model of this run; the default is a new run of two steps")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.peak:
        print(json.dumps(peak(arguments.run, arguments.peak)))
        return
    with tempfile.TemporaryDirectory() as name:
        run, out = arguments.run or Path(name) / "run", str(Path(name) / "audit")
        if arguments.run is None:
            run_command("train", "--out", str(run), "--steps", "2", "--strategy", "loss-free")
        seconds = run_command("audit", str(run), "--tokens", str(TOKENS), "--out", out)
        measured = json.loads((Path(out) / "audit.json").read_text())
        pair = Pair(run).measure()
        few, many = (_peak_in_new_processes(run, tokens) for tokens in (FEW, MANY))
    growth = round(many["peak_mib"] / few["peak_mib"], 3)
    result = {
        "command": "python benchmarks/audit.py",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no accelerator; {THREADS} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("equipoise", "torch", "transformers")},
        "model": {"model_type": measured["model_type"], "num_parameters": measured["num_parameters"]},
        "bars": {"seconds": MOST_SECONDS, "ratio": MOST_RATIO, "growth": MOST_GROWTH},
        "command_time": {
            "tokens": sum(measured["tokens"].values()),
            "seconds": round(seconds, 1),
            "holds": seconds <= MOST_SECONDS,
        },
        "over_bare_forwards": {**pair, "holds": pair["ratio"] <= MOST_RATIO},
        "peak_memory": {"few": few, "many": many, "growth": growth, "holds": growth <= MOST_GROWTH},
    }
    result["holds"] = all(result[part]["holds"] for part in ("command_time", "over_bare_forwards", "peak_memory"))
    write_json(STORED, result)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
