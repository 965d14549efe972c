"""A claim with stand-ins for its runs: results that are written by hand, and a process that trains nothing."""

import threading
import time
from pathlib import Path

from editions import any_claim

from equipoise_lab.records import write_json
from equipoise_lab.reproduce.arms import Choice
from equipoise_lab.reproduce.claim import parse_claim
from equipoise_lab.reproduce.edition import load_edition
from equipoise_lab.reproduce.page import pages

FIRST, ANY = load_edition("first"), any_claim()  # ANY: its pages take claims of any name
LEADERBOARD = FIRST.page.leaderboard
CHOICE = Choice("0.01", {"strategy": "none"})
CLAIM = parse_claim(
    "x",
    {
        "title": "a is lower than b",
        "source": "somewhere",
        "paper": "a 1, b 2",
        "size": "small",
        "seeds": 4,
        "arms": {"a": {"strategy": "none"}, "b": {"strategy": "loss-free"}},
        "primary": {"statistic": "val_nats", "of": "a", "against": "b", "claim": "lower"},
        "also": [{"statistic": "val_nats", "over": {"a": 1, "b": 2}, "claim": "higher"}],
    },
    FIRST.sizes,
    "first",
)


class Quiet:
    """Progress that prints nothing and keeps what it was shown."""

    def __init__(self):
        self.lines, self.shown = [], []

    def say(self, text):
        self.lines.append(text)

    def done(self, number, total, seconds_left):
        self.shown.append((number, total, seconds_left))


def page_text(claims, findings, results):
    """All pages, one after the other."""
    return "\n".join(pages("results.md", ANY, claims, findings, results).values())


def store(results, job, nats=5.0, seconds=10.0, result=None, **more):
    """Stores a run by hand: ``result`` is its result.json, ``more`` is added to the file."""
    results.folder.mkdir(parents=True, exist_ok=True)
    content = {"options": dict(job.options), "result": result or {"val_nats": nats}, "seconds": seconds}
    content |= {"began": "2026-01-02T03:04", "hardware": "2 CPU cores", "versions": {"torch": "2"}}
    write_json(results.folder / f"{results.name(job)}.json", content | more)


def fill(results, differences):
    for seed, difference in enumerate(differences):
        store(results, CLAIM.job("a", seed), 5.0 + seed + difference)
        store(results, CLAIM.job("b", seed), 5.0 + seed)


class Process:
    """A stand-in for `equipoise train` that writes the folder of a run."""

    started, running, most_running = [], 0, 0
    lock = threading.Lock()

    def __init__(self, command, stdout, stderr, env, code=0):
        assert env["OMP_NUM_THREADS"] == "1" and command[1:4] == ["-m", "equipoise", "train"]
        self.arguments, self.stdout, self.code = command[4:], stdout, code
        Process.started.append(self.arguments)

    def wait(self):
        with Process.lock:
            Process.running += 1
            Process.most_running = max(Process.most_running, Process.running)
        time.sleep(0.05)
        with Process.lock:
            Process.running -= 1
        folder = self.arguments[self.arguments.index("--out") + 1]
        if self.code:
            self.stdout.write(b"an earlier line\nequipoise: error: no text\n")
            return self.code
        write_run(folder)
        return 0

    def send_signal(self, number):
        pass


def write_run(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    write_json(
        folder / "config.json",
        {"format": 1, "began": "2026-01-02", "device": "cpu", "dtype": "bfloat16", "versions": {"torch": "2"}},
    )
    (folder / "steps.jsonl").write_text('{"step":1,"seconds":2.0}\n{"step":2,"seconds":3.0}\n')
    write_json(folder / "result.json", {"val_nats": 5.0, "domains": {"law": {"nats": 4.0, "bits_per_byte": 1.0}}})
