"""Which recipe of the small runs shows a difference of scopes best for its cost: ``python benchmarks/power.py``.

Two arms, the load-balancing loss within micro-batches and over the global batch, are trained with the same seeds under
several recipes. The efficiency of a recipe is ``(mean / sd) ** 2`` of the paired differences per core-hour. The larger
mean / sd is, the fewer seeds a verdict needs; the shorter a run is, the less a seed costs.

A run is measured in several ways at once: with the weights of the last step and with the mean of the last tenth, fifth
and two fifths of the steps, each on two amounts of test text. Runs are stored one by one, in
``benchmarks/results/power``, so the script may be stopped and started again. ``docs/tools/power_page.py`` writes the
tables of the page.

The seeds (200, 201, ...) are used for nothing else. Every run has one thread. Costs are processor time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise_lab.reproduce.edition import load_edition
from equipoise_lab.train import loop
from equipoise_lab.train.config import Train
from equipoise_lab.train.engine import reproducible
from equipoise_lab.train.evaluate import evaluate
from equipoise_lab.train.run_folder import SilentWatcher

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/power"
COMMON: dict[str, Any] = {"qk_norm": True, "dtype": "bfloat16", "save_model": False, "checkpoint_every": 10_000}
RECIPES: dict[str, dict[str, Any]] = {
    "200 steps, decay to a tenth": {"steps": 200},
    "200 steps, decay to zero": {"steps": 200, "decay_to": 0.0},
    "100 steps, decay to zero": {"steps": 100, "decay_to": 0.0},
    "200 steps of half the tokens, decay to zero": {"steps": 200, "decay_to": 0.0, "sequences": 4},
    "200 steps, half the learning rate": {"steps": 200, "learning_rate": 1.5e-3},
    "200 steps, half of them warm-up": {"steps": 200, "warmup": 0.5},
}
ARMS = {
    "micro": "lbl:scope=micro_batch,coefficient=0.01",
    "global": "lbl:scope=global_batch,coefficient=0.01",
}
SEEDS = range(200, 203)
AVERAGED = (0.0, 0.1, 0.2, 0.4)  # shares of the steps whose weights are averaged; 0: the last weights
SEQUENCES = (30, 60)  # test sequences of each domain; the packaged text has 60 of 128 tokens


def job_file(recipe: str, arm: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in recipe)
    return RESULTS / f"{name}_{arm}_{seed}.json"


class AveragingTraining(loop._Training):
    """A run that adds up its weights near the end, and is then measured with each mean of them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sums: dict[float, dict[str, Tensor]] = {share: {} for share in AVERAGED if share}
        self.ended = 0.0  # processor time at the end of the training
        self.measured: dict[str, dict[str, float]] = {}

    def _first_averaged(self, share: float) -> int:
        return round(self.config.steps * (1 - share))

    def _step(self, step: int) -> dict[str, Any]:
        row = super()._step(step)
        for share, sums in self.sums.items():
            if step >= self._first_averaged(share):
                for name, parameter in self.inner.named_parameters():
                    value = parameter.detach().double()
                    sums[name] = sums[name] + value if name in sums else value
        return row

    def _finish(self) -> dict[str, Any]:
        self.ended = time.process_time()
        last = {name: parameter.detach().clone() for name, parameter in self.inner.named_parameters()}
        for share in AVERAGED:
            count = self.config.steps - self._first_averaged(share)
            weights = {name: value / count for name, value in self.sums[share].items()} if share else last
            with torch.no_grad():
                for name, parameter in self.inner.named_parameters():
                    parameter.copy_(weights[name])
            for sequences in SEQUENCES:
                self.measured[f"{share:g}/{sequences}"] = self._measure(sequences)
        return {}

    def _measure(self, sequences: int) -> dict[str, float]:
        began = time.process_time()
        figures, _ = evaluate(
            self.inner,
            self.balance,
            self.corpus,
            split="test",
            sequence_length=self.config.sequence_length,
            most_sequences=sequences,
            sequences=8,
            k=self.k,
            device=self.device,
            autocast=self.autocast,
        )
        keys = ("val_nats", "maxvio_global", "domain_information_bits")
        return {key: figures[key] for key in keys} | {"core_seconds": time.process_time() - began}


def measure(recipe: str, arm: str, seed: int) -> None:
    """Trains one run in this process and stores what it shows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options = {**COMMON, **RECIPES[recipe], "strategy": ARMS[arm], "seed": seed, "out": Path(folder) / "run"}
        config = Train(**options)
        config.check()
        began = time.process_time()
        with reproducible():
            training = AveragingTraining(config, SilentWatcher(), "")
            training.run()
            training.folder.release()
    stored = {
        "recipe": recipe,
        "arm": arm,
        "seed": seed,
        "options": {key: value for key, value in options.items() if key != "out"},
        "commit": commit(),
        "core_seconds": training.ended - began,  # of the training alone; each way adds its evaluation
        "measured": training.measured,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = job_file(recipe, arm, seed)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def run_all(workers: int) -> None:
    """Seed by seed, so that stored runs are always paired."""
    jobs = [(recipe, arm, seed) for seed in SEEDS for recipe in RECIPES for arm in ARMS]
    missing = [job for job in jobs if not job_file(*job).exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are stored", file=sys.stderr)

    def one(job: tuple[str, str, int]) -> int:
        command = [sys.executable, __file__, "--one", job[0], job[1], str(job[2])]
        done = subprocess.run(command, capture_output=True, text=True)
        outcome = "stored" if done.returncode == 0 else f"failed: {done.stderr[-500:]}"
        print(f"{job[0]}, {job[1]}, seed {job[2]}: {outcome}", file=sys.stderr, flush=True)
        return done.returncode

    with ThreadPoolExecutor(workers) as pool:
        if any(pool.map(one, missing)):
            sys.exit("Some runs failed. Run the same command again: it makes those that are missing.")


def rows() -> list[dict[str, Any]]:
    """One row for each recipe, averaging and amount of text, the highest efficiency first."""
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    by_recipe: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for run in stored:
        by_recipe.setdefault(run["recipe"], {})[run["arm"], run["seed"]] = run
    table = []
    for recipe, runs in by_recipe.items():
        seeds = [seed for arm, seed in runs if arm == "micro" and ("global", seed) in runs]
        if len(seeds) < 3:
            continue
        for way in next(iter(runs.values()))["measured"]:
            seconds = [run["core_seconds"] + run["measured"][way]["core_seconds"] for run in runs.values()]
            hours = statistics.fmean(seconds) * len(ARMS) / 3600
            nats = {arm: [runs[arm, seed]["measured"][way]["val_nats"] for seed in seeds] for arm in ARMS}
            differences = [b - a for a, b in zip(nats["micro"], nats["global"], strict=True)]
            mean, sd = statistics.fmean(differences), statistics.stdev(differences)
            share, sequences = way.split("/")
            table.append(
                {
                    "recipe": recipe,
                    "averaged": float(share),
                    "sequences": int(sequences),
                    "seeds": len(seeds),
                    "loss": statistics.fmean(nats["global"]),
                    "mean": mean,
                    "sd": sd,
                    "core_hours": hours,
                    "efficiency": (mean / sd) ** 2 / hours,
                }
            )
    return sorted(table, key=lambda row: -row["efficiency"])


def control_variates() -> list[float]:
    """For each pair of arms of the first edition's leaderboard: the share of the variance of their difference that the
    loss of the unbalanced run with the same seed explains, corrected for chance (adjusted R squared)."""
    edition = load_edition("first")
    results = edition.results(ROOT / "benchmarks/results/claims")
    claims = {claim.name: claim for claim in edition.claims_with_values(results)}

    def losses(name: str, arm: str) -> dict[int, float]:
        stored = {seed: results.get(claims[name].job(arm, seed)) for seed in claims[name].all_seeds}
        return {seed: run["result"]["val_nats"] for seed, run in stored.items() if run is not None}

    unbalanced = losses("6-expert-choice", "top-k")
    arms = [losses("8-leaderboard", arm) for arm in claims["8-leaderboard"].arms]
    shares = []
    for number, arm in enumerate(arms):
        for other in arms[:number]:
            seeds = sorted(set(arm) & set(other) & set(unbalanced))
            difference = [arm[seed] - other[seed] for seed in seeds]
            n, r = len(seeds), statistics.correlation(difference, [unbalanced[seed] for seed in seeds])
            shares.append(1 - (1 - r * r) * (n - 1) / (n - 2))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--one", nargs=3, metavar=("RECIPE", "ARM", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the table of the stored runs, and run nothing")
    options = parser.parse_args()
    if options.one:
        recipe, arm, seed = options.one
        measure(recipe, arm, int(seed))
        return
    if not options.table:
        run_all(options.workers)
    for row in rows():
        print(
            f"{row['efficiency']:7.0f} per core-hour  {row['recipe']:45} averaged {row['averaged']:.1f}, "
            f"{row['sequences']:3} sequences: {row['mean']:+.4f} ± {row['sd']:.4f} of {row['seeds']}"
        )


if __name__ == "__main__":
    main()
