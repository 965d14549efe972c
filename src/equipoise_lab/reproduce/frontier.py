"""Frontiers: loss and balance of each mechanism over its coefficient or rate, and the value that claims take.

All mechanisms are tuned alike: the same size, the same seeds, a grid of values (``frontiers.toml``). No claim that
takes a value from a frontier uses its seeds. Both figures below are means over seeds on the selection text; claims
report other seeds on the test text.

1. Among the values with a MaxVio of at most ``most_maxvio``, the one with the lowest loss is chosen. If there is none,
   the one with the lowest MaxVio is.
2. If the chosen value is at an edge of the grid, the grid is widened there and the choice is made again.

Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise_lab.reproduce.claim import Job, job_of, read_toml
from equipoise_lab.reproduce.runs import Results

__all__ = ["FRONTIERS", "Frontier", "Point"]


@dataclass(frozen=True)
class Point:
    """The results of one value. For a mechanism without a number (``none``, ``quantile``) the value is ""."""

    value: str
    runs: tuple[Mapping[str, Any], ...]  # result.json of each seed

    def mean(self, statistic: str) -> float:
        """Over the seeds; infinite if a run diverged."""
        values = [math.inf if run.get(statistic) is None else run[statistic] for run in self.runs]
        return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Frontier:
    """One mechanism over the values of its coefficient or rate."""

    name: str
    arm: Mapping[str, Any]  # options of ``equipoise train``; "{}" in the strategy is the value
    values: tuple[float, ...]
    size: str
    seeds: tuple[int, ...]
    most_maxvio: float
    most_widenings: int

    def job(self, value: str, seed: int) -> Job:
        return job_of(self.size, {**self.arm, "strategy": self.arm["strategy"].format(value)}, seed)

    def point(self, value: str, results: Results) -> Point | None:
        """The results of a value; None while one of its runs is missing."""
        stored = [results.get(self.job(value, seed)) for seed in self.seeds]
        runs = [run["result"] for run in stored if run is not None]
        return Point(value, tuple(runs)) if len(runs) == len(self.seeds) else None

    def grid(self, results: Results) -> list[str]:
        """The values to try: those of the file, and more beyond an edge that holds the best one."""
        grid = [f"{value:g}" for value in sorted(self.values)] or [""]
        for _ in range(self.most_widenings if self.values else 0):
            best = self._best(grid, results)
            if best == grid[0]:
                grid = [_neighbour(grid[0], -1), *grid]
            elif best == grid[-1]:
                grid = [*grid, _neighbour(grid[-1], 1)]
        return grid

    def _best(self, grid: list[str], results: Results) -> str | None:
        points = [point for value in grid if (point := self.point(value, results)) is not None]
        return min(points, key=self._rank).value if len(points) == len(grid) else None

    def _rank(self, point: Point) -> tuple[float, ...]:
        maxvio = point.mean("selection_maxvio")
        return (0.0, point.mean("selection_nats")) if maxvio <= self.most_maxvio else (1.0, maxvio)

    def chosen(self, results: Results) -> str | None:
        """The value for the claims; None while a run is missing."""
        return self._best(self.grid(results), results)

    def at_edge(self, results: Results) -> bool:
        """Whether the chosen value is at an edge of the grid even after all widenings."""
        grid = self.grid(results)
        return len(grid) > 1 and self.chosen(results) in (grid[0], grid[-1])

    def jobs(self, results: Results) -> list[Job]:
        """The runs of the current grid, seed by seed."""
        return [self.job(value, seed) for seed in self.seeds for value in self.grid(results)]


def _neighbour(value: str, direction: int) -> str:
    """The value before or after in 0.001, 0.003, 0.01, 0.03, ..."""
    place = round(2 * math.log10(float(value))) + direction  # half decades: 3 stands for the root of 10
    return f"{(3 if place % 2 else 1) * 10.0 ** (place // 2):g}"


def _load() -> dict[str, Frontier]:
    content = read_toml(files("equipoise_lab.reproduce") / "frontiers.toml")
    common = content["common"]
    frontiers = {}
    for name, arm in content["frontiers"].items():
        options = {key: value for key, value in arm.items() if key != "values"}
        values = tuple(arm.get("values", ()))
        if ("{}" in options["strategy"]) != bool(values):
            raise EquipoiseError(
                f"frontier {name}: a strategy must have values if and only if it holds {{}}: got "
                f"{options['strategy']!r} and {len(values)} values."
            )
        frontiers[name] = Frontier(name=name, arm=options, values=values, **{**common, "seeds": tuple(common["seeds"])})
    return frontiers


FRONTIERS: dict[str, Frontier] = _load()
