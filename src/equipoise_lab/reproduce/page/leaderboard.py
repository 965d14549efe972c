"""The table of the arms of one claim, by loss, balance and specialisation."""

import math
from collections.abc import Mapping
from typing import Any

from equipoise_lab.reproduce.claim import Claim
from equipoise_lab.reproduce.page.wording import number, options_text
from equipoise_lab.reproduce.results import Results

__all__ = ["arms", "leaderboard"]

STATISTICS = ("val_nats", "maxvio_global", "domain_information_bits")


def arms(claim: Claim, results: Results) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The stored results that have all statistics of a leaderboard, by arm and seed."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for arm in claim.arms:
        stored = {seed: (results.get(claim.job(arm, seed)) or {}).get("result", {}) for seed in claim.all_seeds}
        by_arm[arm] = {
            seed: result for seed, result in stored.items() if all(result.get(name) is not None for name in STATISTICS)
        }
    return by_arm


def leaderboard(claim: Claim, link: str, results: Results) -> list[str]:
    """A table of the arms over the seeds that all of them have, lowest loss first."""
    by_arm = {arm: by_seed for arm, by_seed in arms(claim, results).items() if by_seed}
    seeds = set.intersection(*(set(by_seed) for by_seed in by_arm.values())) if by_arm else set()
    if not seeds or len(by_arm) < 2:
        return ["This comparison has no results yet.", ""]
    means = {
        arm: [math.fsum(by_seed[seed][name] for seed in seeds) / len(seeds) for name in STATISTICS]
        for arm, by_seed in by_arm.items()
    }
    lines = [
        f"The arms of claim {claim.name} over the {len(seeds)} seeds that all of them have, sorted by loss.",
        f"The details of {link} say which of these differences stand out from the noise.",
        "",
        "| arm | options | loss | MaxVio | domain information, bits |",
        "|---|---|---|---|---|",
    ]
    for arm, values in sorted(means.items(), key=lambda item: item[1]):
        cells = " | ".join(number(value, name) for name, value in zip(STATISTICS, values, strict=True))
        lines.append(f"| {arm} | {options_text(claim.arms[arm])} | {cells} |")
    if without := [arm for arm in claim.arms if arm not in by_arm]:
        lines += ["", f"Without results yet: {', '.join(without)}."]
    return [*lines, ""]
