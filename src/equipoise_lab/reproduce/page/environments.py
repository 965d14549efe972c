"""Whether the runs of a claim are alike in what they were made with: commit, machine, versions."""

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.jobs import Job
from equipoise_lab.reproduce.made_with import NOT_RECORDED, THREADS
from equipoise_lab.reproduce.results import Results

__all__ = ["all_made_with_line", "differences", "made_with_line"]


def _made_with(stored: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made with, by what may differ."""
    threads = stored.get("threads", THREADS)
    device = stored["hardware"].rpartition(", ")[0].rpartition(", ")[2]  # the last but one of its parts
    text = {"text": f"text {stored['text']}"} if "text" in stored else {}
    return text | {
        "commit": f"commit {stored.get('commit', NOT_RECORDED)}",
        "CPU": f"CPU {stored.get('cpu', NOT_RECORDED)}",
        "threads": "1 thread" if threads == 1 else f"{threads} threads",
        "torch": f"torch {stored['versions'].get('torch', NOT_RECORDED)}",
        "device": f"device {device}",
    }


JobsByArm = Mapping[str, Sequence[Job]]


def _jobs(claim: Claim) -> JobsByArm:
    return {arm: claim.jobs_of(arm) for arm in claim.arms}


def _by_arm(jobs: JobsByArm, results: Results) -> dict[str, list[dict[str, str]]]:
    """What the stored runs of each arm were made with."""
    stored = {arm: [results.get(job) for job in of_arm] for arm, of_arm in jobs.items()}
    return {arm: [_made_with(run) for run in runs if run is not None] for arm, runs in stored.items()}


def differences(claim: Claim, results: Results) -> list[str]:
    """What the stored runs of a claim differ in, each with the arms that have it; empty if they are alike."""
    return _differences(_by_arm(_jobs(claim), results))


def _differences(by_arm: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    different = []
    for what in ("text", "commit", "CPU", "threads", "torch", "device"):
        arms_by_value: dict[str, list[str]] = {}
        for arm, runs in by_arm.items():
            for value in dict.fromkeys(run[what] for run in runs if what in run):
                arms_by_value.setdefault(value, []).append(arm)
        if len(arms_by_value) > 1:
            different.append(", ".join(f"{value} (arms {', '.join(arms)})" for value, arms in arms_by_value.items()))
    return different


def made_with_line(claim: Claim, results: Results) -> str:
    """What all runs of the claim were made with, or a warning that names the arms that differ; "" without runs."""
    are_alike, are_not = "All runs of this claim", "**The runs of this claim are not alike:**"
    return all_made_with_line(are_alike, are_not, _jobs(claim), results)


def all_made_with_line(are_alike: str, are_not: str, jobs: JobsByArm, results: Results) -> str:
    """What all the runs were made with, after ``are_alike``; if they differ, in what, after ``are_not``."""
    by_arm = _by_arm(jobs, results)
    if different := _differences(by_arm):
        return f"{are_not} {'; '.join(different)}."
    made_with = [run for runs in by_arm.values() for run in runs]
    if not made_with:
        return ""
    return f"{are_alike}: {', '.join(made_with[0][what] for what in ('commit', 'CPU', 'threads', 'torch'))}."
