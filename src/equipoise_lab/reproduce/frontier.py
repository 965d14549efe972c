"""Frontiers: loss and balance of each mechanism over its coefficient or rate, and the value that claims take.

The mechanisms that claims compare are tuned alike: the same size, the same seeds, a grid of values, one rule. No claim
that takes a value from a frontier uses its seeds. Both figures below are means over seeds on the selection text; claims
report other seeds on the test text.

1. Among the values with a MaxVio of at most ``most_maxvio``, the one with the lowest loss is chosen. If there is none,
   the one with the lowest MaxVio is.
2. If the chosen value is at an edge of the grid, the grid is widened there and the choice is made again.

An edition may choose learning rates in a second stage: a frontier then runs at its chosen value with each of several
learning rates, and the same two rules choose one. The file ``frontiers.toml``:

    [common]                       for all frontiers
    size = "small"                 of ``sizes.toml``
    seeds = [100, 101]
    most_maxvio = 1.5
    most_widenings = 3             of a grid of values

    [frontiers.NAME]               the options of ``equipoise train`` that the mechanism adds to those of the size
    strategy = "lbl:coefficient={}"
    values = [0.01, 0.03]          each stands for {} once; a mechanism without a number has neither

    [learning_rates]               the second stage (optional)
    frontiers = ["NAME", ...]      which have it
    values = [1e-3, 3e-3]          one of them is that of the size, whose runs the first stage has done
    most_widenings = 1             of a grid of learning rates, by the ratio of the two outermost ones

Imports no torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise_lab.reproduce.arms import Choice
from equipoise_lab.reproduce.jobs import Job, job_of
from equipoise_lab.reproduce.results import Results

__all__ = ["Frontier", "LearningRates", "Point", "parse_frontiers"]


@dataclass(frozen=True)
class Point:
    """The results of one value or learning rate. For a mechanism without a number (``none``, ``quantile``) the value
    is ""."""

    value: str
    runs: tuple[Mapping[str, Any], ...]  # result.json of each seed

    def mean(self, statistic: str) -> float:
        """Over the seeds; infinite if a run diverged."""
        values = [math.inf if run.get(statistic) is None else run[statistic] for run in self.runs]
        return math.fsum(values) / len(values)


@dataclass(frozen=True)
class LearningRates:
    """The second stage: the learning rates to try."""

    values: tuple[float, ...]
    most_widenings: int


@dataclass(frozen=True)
class Frontier:
    """One mechanism over the values of its coefficient or rate, and then over learning rates."""

    name: str
    arm: Mapping[str, Any]  # options of ``equipoise train``; "{}" in the strategy is the value
    values: tuple[float, ...]
    size: str
    shared: Mapping[str, Any]  # the options of the size
    seeds: tuple[int, ...]
    most_maxvio: float
    most_widenings: int
    learning_rates: LearningRates | None = None

    def options(self, value: str, learning_rate: str | None = None) -> dict[str, Any]:
        """The options of ``equipoise train`` that the size does not set."""
        rate = {} if learning_rate is None else {"learning_rate": float(learning_rate)}
        return {**self.arm, "strategy": self.arm["strategy"].format(value), **rate}

    def job(self, value: str, seed: int, learning_rate: str | None = None) -> Job:
        return job_of(self.shared, self.options(value, learning_rate), seed)

    def point(self, value: str, results: Results) -> Point | None:
        """The results of a value, at the learning rate of the size; None while one of its runs is missing."""
        return self._point(value, [self.job(value, seed) for seed in self.seeds], results)

    def learning_rate_point(self, learning_rate: str, results: Results) -> Point | None:
        """The results of a learning rate at the chosen value; None while one of its runs is missing."""
        value = self.value(results)
        if value is None:
            return None
        return self._point(learning_rate, [self.job(value, seed, learning_rate) for seed in self.seeds], results)

    def _point(self, value: str, jobs: Sequence[Job], results: Results) -> Point | None:
        stored = [results.get(job) for job in jobs]
        runs = [run["result"] for run in stored if run is not None]
        return Point(value, tuple(runs)) if len(runs) == len(jobs) else None

    def grid(self, results: Results) -> list[str]:
        """The values to try: those of the file, and more beyond an edge that holds the best one."""
        grid = [f"{value:g}" for value in sorted(self.values)] or [""]
        most_widenings = self.most_widenings if self.values else 0
        return _widened(grid, most_widenings, _half_decade_beyond, lambda grid: self._best_value(grid, results))

    def learning_rate_grid(self, results: Results) -> list[str]:
        """The learning rates to try; none without a second stage, or before a value is chosen."""
        if self.learning_rates is None or self.value(results) is None:
            return []
        grid = [f"{value:g}" for value in sorted(self.learning_rates.values)]
        most_widenings = self.learning_rates.most_widenings
        return _widened(grid, most_widenings, _ratio_beyond, lambda grid: self._best_learning_rate(grid, results))

    def _best_value(self, grid: list[str], results: Results) -> str | None:
        return self._best([self.point(value, results) for value in grid])

    def _best_learning_rate(self, grid: list[str], results: Results) -> str | None:
        return self._best([self.learning_rate_point(learning_rate, results) for learning_rate in grid])

    def _best(self, grid: Sequence[Point | None]) -> str | None:
        points = [point for point in grid if point is not None]
        return min(points, key=self._rank).value if len(points) == len(grid) else None

    def _rank(self, point: Point) -> tuple[float, ...]:
        maxvio = point.mean("selection_maxvio")
        return (0.0, point.mean("selection_nats")) if maxvio <= self.most_maxvio else (1.0, maxvio)

    def value(self, results: Results) -> str | None:
        """The chosen value; None while a run is missing."""
        return self._best_value(self.grid(results), results)

    def learning_rate(self, results: Results) -> str | None:
        """The chosen learning rate; None without a second stage, and while a run is missing."""
        grid = self.learning_rate_grid(results)
        return self._best_learning_rate(grid, results) if grid else None

    def chosen(self, results: Results) -> Choice | None:
        """What claims take, after all stages; None while a run is missing."""
        value, learning_rate = self.value(results), self.learning_rate(results)
        if value is None or (self.learning_rates is not None and learning_rate is None):
            return None
        return Choice(value, self.options(value, learning_rate))

    def refused_for_balance(self, results: Results) -> list[str]:
        """The values with a lower loss than the chosen one, which is chosen because their MaxVio is too large."""
        points = [point for value in self.grid(results) if (point := self.point(value, results)) is not None]
        chosen = next((point for point in points if point.value == self.value(results)), None)
        if chosen is None:
            return []
        return [point.value for point in points if point.mean("selection_nats") < chosen.mean("selection_nats")]

    def at_edge(self, results: Results) -> bool:
        """Whether the chosen value is at an edge of the grid even after all widenings."""
        grid = self.grid(results)
        return len(grid) > 1 and self.value(results) in (grid[0], grid[-1])

    def learning_rate_at_edge(self, results: Results) -> bool:
        """The same of the chosen learning rate."""
        grid = self.learning_rate_grid(results)
        return len(grid) > 1 and self.learning_rate(results) in (grid[0], grid[-1])

    def jobs(self, results: Results) -> list[Job]:
        """The runs of the current grids, seed by seed, those of values first."""
        jobs = [self.job(value, seed) for seed in self.seeds for value in self.grid(results)]
        if (value := self.value(results)) is not None:
            grid = self.learning_rate_grid(results)
            jobs += [self.job(value, seed, learning_rate) for seed in self.seeds for learning_rate in grid]
        return list(dict.fromkeys(jobs))


def _widened(
    grid: list[str],
    most_widenings: int,
    beyond: Callable[[list[str], bool], str],
    best_of: Callable[[list[str]], str | None],
) -> list[str]:
    """The grid, with a value more at each edge that holds the best one. ``beyond``: the value below or above a grid."""
    for _ in range(most_widenings):
        best = best_of(grid)
        if best == grid[0]:
            grid = [beyond(grid, False), *grid]
        elif best == grid[-1]:
            grid = [*grid, beyond(grid, True)]
    return grid


def _half_decade_beyond(grid: list[str], is_above: bool) -> str:
    """The value before or after in 0.001, 0.003, 0.01, 0.03, ..."""
    end = float(grid[-1] if is_above else grid[0])
    place = round(2 * math.log10(end)) + (1 if is_above else -1)  # half decades: 3 stands for the root of 10
    return f"{(3 if place % 2 else 1) * 10.0 ** (place // 2):g}"


def _ratio_beyond(grid: list[str], is_above: bool) -> str:
    end, before = (float(value) for value in (grid[-1:-3:-1] if is_above else grid[:2]))
    return f"{end * end / before:g}"


def parse_frontiers(content: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Frontier]:
    """The frontiers in the content of a file. Raises ``EquipoiseError``, which says what must hold."""
    common = dict(content.get("common", {}))
    if set(common) != {"size", "seeds", "most_maxvio", "most_widenings"}:
        raise EquipoiseError(
            f"frontiers: common must have size, seeds, most_maxvio and most_widenings: got {', '.join(common)}."
        )
    common["seeds"] = tuple(common["seeds"])
    if common["size"] not in sizes:
        raise EquipoiseError(f"frontiers: size must be one of {', '.join(sizes)}: got {common['size']!r}.")
    shared = sizes[common["size"]]
    stage = content.get("learning_rates")
    if stage is not None:
        _check_learning_rates(stage, content["frontiers"], common["size"], shared)
    frontiers = {}
    for name, arm in content["frontiers"].items():
        options = {key: value for key, value in arm.items() if key != "values"}
        values = tuple(arm.get("values", ()))
        if "strategy" not in options:
            raise EquipoiseError(f"frontier {name}: a frontier must have a strategy: it has {', '.join(options)}.")
        if ("{}" in options["strategy"]) != bool(values):
            raise EquipoiseError(
                f"frontier {name}: a strategy must have values if and only if it holds {{}}: got "
                f"{options['strategy']!r} and {len(values)} values."
            )
        rates = None
        if stage is not None and name in stage["frontiers"]:
            rates = LearningRates(tuple(stage["values"]), stage["most_widenings"])
        frontiers[name] = Frontier(name=name, arm=options, values=values, shared=shared, learning_rates=rates, **common)
    return frontiers


def _check_learning_rates(
    stage: Mapping[str, Any], frontiers: Mapping[str, Any], size: str, shared: Mapping[str, Any]
) -> None:
    if set(stage) != {"frontiers", "values", "most_widenings"}:
        raise EquipoiseError(
            f"frontiers: learning_rates must have frontiers, values and most_widenings: got {', '.join(stage)}."
        )
    for name in stage["frontiers"]:
        if name not in frontiers:
            raise EquipoiseError(
                f"frontiers: learning_rates must name frontiers of the file ({', '.join(frontiers)}): got {name!r}."
            )
        if "learning_rate" in frontiers[name]:
            raise EquipoiseError(
                f"frontier {name}: a frontier of learning_rates must not set learning_rate itself: remove one of them."
            )
    if len(stage["values"]) < 2:
        raise EquipoiseError(f"frontiers: learning_rates must have at least two values: got {stage['values']}.")
    if shared.get("learning_rate") not in stage["values"]:
        raise EquipoiseError(
            f"frontiers: the values of learning_rates must hold the learning_rate that size {size} names, at which "
            f"coefficients are chosen: got {stage['values']} and {shared.get('learning_rate')!r}."
        )
