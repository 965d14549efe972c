"""Claims: what is compared and what would support it, written down before anything is run. Imports no torch.

A claim is a TOML file in ``claims/``:

    title = "..."                  one sentence that can be true or false
    source = "..."                 the paper and the place in it
    paper = "..."                  the figures that it reports
    size = "small" | "standard"    of ``sizes.toml``: the options that all arms share
    seeds = 8                      0, 1, ..., paired between arms
    note = "..."                   what else a reader must know (optional)

    first_seed = 0                 if the seeds do not start at 0 (optional)
    dtype = "float32"              for all arms, in place of the precision of the size (optional)

    [arms.NAME]                    the options of ``equipoise train`` that this arm adds to those of its size
    strategy = "..."               "{NAME}" stands for the coefficient or rate chosen on a frontier (``frontier.py``),
                                   "{NAME/100}" for a hundredth of it
    seeds = 3                      only the first so many seeds, for an arm without a verdict on a loss (optional)

    [primary]                      the one comparison that decides; [[also]] adds others, for information
    statistic = "val_nats"         a key of a run's result.json, or a difference of two: "val_nats - train_nats"
    of = "NAME"                    the difference is the statistic of this arm
    against = "NAME"               minus that of this arm
    claim = "lower" | "higher" | "equal"
    margin = 0.01                  for "equal" only: smaller differences count as none. By default, for a loss, a third
                                   of the difference between the arms of claim 1-scope

A trend has ``over = {NAME = 1, NAME = 2, ...}`` instead of ``of`` and ``against``. Its statistic is a slope, seed by
seed, over log2 of these numbers.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from equipoise.errors import EquipoiseError, UsageError

__all__ = [
    "DTYPES",
    "SIZES",
    "Claim",
    "Comparison",
    "Job",
    "claim_names",
    "job_of",
    "load_claim",
    "parse_claim",
    "read_toml",
]

_FOLDER = files("equipoise_lab.reproduce") / "claims"
DTYPES = ("bfloat16", "float32")
_LOSSES = ("val_nats", "train_nats")
_PLACEHOLDER = re.compile(r"\{([\w-]+)(?:/(\d+))?\}")


def read_toml(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise EquipoiseError(f"{file} must be TOML: {error}. Restore the file.") from None


SIZES: dict[str, dict[str, Any]] = read_toml(files("equipoise_lab.reproduce") / "sizes.toml")


@dataclass(frozen=True)
class Comparison:
    """A statistic of two arms, or of several arms over a factor, and the direction that is claimed."""

    statistic: str
    claim: str  # lower, higher, equal
    of: str = ""
    against: str = ""
    over: Mapping[str, float] = field(default_factory=dict)
    margin: float | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.over) or (self.against, self.of)

    def __str__(self) -> str:
        if self.over:
            return f"{self.statistic} over {', '.join(f'{value:g}' for value in self.over.values())}"
        return f"{self.statistic}, {self.of} − {self.against}"


@dataclass(frozen=True)
class Job:
    """One run that a claim needs: options of ``equipoise train``, with a seed."""

    options: tuple[tuple[str, Any], ...]

    def with_option(self, name: str, value: Any) -> "Job":
        return Job(tuple(sorted({**dict(self.options), name: value}.items())))

    @property
    def arguments(self) -> list[str]:
        """The options as command line arguments."""
        arguments = []
        for name, value in self.options:
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                arguments += [flag] if value else []
            else:
                arguments += [flag, str(value)]
        return arguments


@dataclass(frozen=True)
class Claim:
    """What a paper claims, and the runs that decide it."""

    name: str
    title: str
    source: str
    paper: str
    size: str
    seeds: int
    arms: Mapping[str, Mapping[str, Any]]
    primary: Comparison
    also: tuple[Comparison, ...] = ()
    note: str = ""
    first_seed: int = 0
    dtype: str | None = None
    seeds_of: Mapping[str, int] = field(default_factory=dict)  # by arm, for those with fewer than the claim

    @property
    def frontiers(self) -> list[str]:
        """The frontiers that its arms still need a coefficient or rate from, each once."""
        options = (str(value) for arm in self.arms.values() for value in arm.values())
        return list(dict.fromkeys(name for option in options for name, _ in _PLACEHOLDER.findall(option)))

    def with_values(self, chosen: Mapping[str, str | None]) -> "Claim":
        """The claim with the chosen values filled in; a placeholder without a value (None) stays."""

        def fill(placeholder: re.Match[str]) -> str:
            name, divisor = placeholder.groups()
            value = chosen.get(name)
            if value is None:
                return placeholder[0]
            return value if divisor is None else f"{float(value) / int(divisor):g}"

        def filled(option: Any) -> Any:
            return _PLACEHOLDER.sub(fill, option) if isinstance(option, str) else option

        arms = {name: {key: filled(option) for key, option in arm.items()} for name, arm in self.arms.items()}
        return replace(self, arms=arms)

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def seeds_for(self, comparison: Comparison) -> int:
        """How many seeds all arms of the comparison are planned to have."""
        return min(self.seeds_of.get(arm, self.seeds) for arm in comparison.arms)

    def job(self, arm: str, seed: int) -> Job:
        precision = {} if self.dtype is None else {"dtype": self.dtype}
        return job_of(self.size, precision | dict(self.arms[arm]), seed)

    def jobs(self) -> list[Job]:
        """All runs, seed by seed, so that finished runs are always paired; none while an arm still needs a value."""
        return [] if self.frontiers else self.planned()

    def planned(self) -> list[Job]:
        """All runs, even those that cannot start yet because an arm still needs a value."""
        return [
            self.job(arm, seed)
            for number, seed in enumerate(self.all_seeds)
            for arm in self.arms
            if number < self.seeds_of.get(arm, self.seeds)
        ]


def job_of(size: str, arm: Mapping[str, Any], seed: int) -> Job:
    return Job(tuple(sorted({**SIZES[size], **arm, "seed": seed}.items())))


def claim_names() -> list[str]:
    names = (file.name for file in _FOLDER.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_claim(name: str) -> Claim:
    if name not in claim_names():
        raise UsageError(f"CLAIM must be all or one of {', '.join(claim_names())}: got {name!r}.")
    return parse_claim(name, read_toml(_FOLDER / f"{name}.toml"))


def parse_claim(name: str, content: Mapping[str, Any]) -> Claim:
    """The claim in a file's content. Raises ``EquipoiseError``, which names what is missing or wrong."""
    required = {"title", "source", "paper", "size", "seeds", "arms", "primary"}
    _check_keys(name, content, required, required | {"also", "note", "first_seed", "dtype"})
    if content["size"] not in SIZES:
        raise EquipoiseError(f"claim {name}: size must be one of {', '.join(SIZES)}: got {content['size']!r}.")
    if content.get("dtype", DTYPES[0]) not in DTYPES:
        raise EquipoiseError(f"claim {name}: dtype must be one of {', '.join(DTYPES)}: got {content['dtype']!r}.")
    if not isinstance(content["seeds"], int) or content["seeds"] < 2:
        raise EquipoiseError(f"claim {name}: seeds must be a whole number of at least 2: got {content['seeds']!r}.")
    arms = {arm: dict(options) for arm, options in content["arms"].items()}
    seeds_of = {arm: options.pop("seeds") for arm, options in arms.items() if "seeds" in options}
    for arm, options in arms.items():
        if "strategy" not in options:
            raise EquipoiseError(
                f"claim {name}: arm {arm} must have a strategy: it has {', '.join(options) or 'no option'}."
            )
    for arm, seeds in seeds_of.items():
        if not isinstance(seeds, int) or not 2 <= seeds < content["seeds"]:
            raise EquipoiseError(
                f"claim {name}: seeds of arm {arm} must be a whole number of at least 2 and below the "
                f"{content['seeds']} of the claim: got {seeds!r}."
            )
    return Claim(
        name=name,
        title=content["title"],
        source=content["source"],
        paper=content["paper"],
        size=content["size"],
        seeds=content["seeds"],
        arms=arms,
        primary=_comparison(name, content["primary"], arms),
        also=tuple(_comparison(name, each, arms) for each in content.get("also", ())),
        note=content.get("note", ""),
        first_seed=content.get("first_seed", 0),
        dtype=content.get("dtype"),
        seeds_of=seeds_of,
    )


def _comparison(name: str, content: Mapping[str, Any], arms: Mapping[str, Any]) -> Comparison:
    ends = {"over"} if "over" in content else {"of", "against"}
    margin = {"margin"} if content.get("claim") == "equal" else set()
    _check_keys(name, content, {"statistic", "claim"} | ends, {"statistic", "claim"} | ends | margin)
    comparison = Comparison(**content)
    if comparison.claim not in ("lower", "higher", "equal"):
        raise EquipoiseError(f"claim {name}: claim must be lower, higher or equal: got {comparison.claim!r}.")
    if comparison.claim == "equal" and comparison.margin is None and comparison.statistic not in _LOSSES:
        raise EquipoiseError(f"claim {name}: {comparison} must have a margin: only losses have one by default.")
    for arm in comparison.arms:
        if arm not in arms:
            raise EquipoiseError(
                f"claim {name}: {comparison} must name arms of the claim ({', '.join(arms)}): got {arm!r}."
            )
    return comparison


def _check_keys(name: str, content: Mapping[str, Any], required: set[str], known: set[str]) -> None:
    if missing := required - set(content):
        raise EquipoiseError(f"claim {name}: required keys are missing: {', '.join(sorted(missing))}.")
    if unknown := set(content) - known:
        raise EquipoiseError(f"claim {name}: unknown keys: {', '.join(sorted(unknown))}. Remove them.")
