"""Claims: small files that say, before anything is run, what is compared and what would support it. Imports no torch.

A claim is a TOML file in ``claims/``:

    title = "..."                  one sentence that can be true or false
    source = "..."                 where it is claimed
    paper = "..."                  what is reported there
    size = "small" | "standard"    see ``sizes.toml``: everything that all arms of all claims have in common
    seeds = 8                      0, 1, ..., paired between arms
    note = "..."                   what a reader must know besides

    first_seed = 0                 of the seeds, if they are not 0, 1, ...
    dtype = "float32"              of all arms, if it is not that of the size

    [arms.NAME]                    options of ``equipoise train`` that this arm has besides those of its size
    strategy = "..."               "{NAME}" in it is the coefficient or rate chosen on a frontier, see ``frontier.py``,
                                   "{NAME/100}" a hundredth of it
    seeds = 3                      of an arm that no verdict on a loss needs: fewer than the claim's, its first ones

    [primary]                      the one comparison that decides; [[also]] are further ones, for information
    statistic = "val_nats"         a key of a run's result.json, or a difference of two, "val_nats - train_nats"
    of = "NAME"                    the difference is of this arm
    against = "NAME"               to that one
    claim = "lower" | "higher" | "equal"
    margin = 0.01                  of "equal" only: how much of a difference is none; without it, of a loss, a third of
                                   what claim 1-scope finds between its arms

A trend has ``over = {NAME = 1, NAME = 2, ...}`` in place of ``of`` and ``against``: by seed, the slope of the statistic
over log2 of these numbers.
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
_CHOSEN = re.compile(r"\{([\w-]+)(?:/(\d+))?\}")


def read_toml(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise EquipoiseError(f"{file} must be TOML: {error}. Restore the file.") from None


SIZES: dict[str, dict[str, Any]] = read_toml(files("equipoise_lab.reproduce") / "sizes.toml")


@dataclass(frozen=True)
class Comparison:
    """One statistic of two arms, or of several over a factor, and what is claimed of it."""

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
        """As the command line takes them."""
        found = []
        for name, value in self.options:
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                found += [flag] if value else []
            else:
                found += [flag, str(value)]
        return found


@dataclass(frozen=True)
class Claim:
    """What is claimed, where, and which runs decide it."""

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
    seeds_of: Mapping[str, int] = field(default_factory=dict)  # of the arms that have fewer than the claim

    @property
    def frontiers(self) -> list[str]:
        """The frontiers on which a coefficient or rate of its arms has yet to be chosen, each once."""
        options = (str(value) for arm in self.arms.values() for value in arm.values())
        return list(dict.fromkeys(name for option in options for name, _ in _CHOSEN.findall(option)))

    def with_values(self, chosen: Mapping[str, str | None]) -> "Claim":
        """The claim with what was chosen in place; what was not stays open."""

        def value(match: re.Match[str]) -> str:
            name, divisor = match.groups()
            there = chosen.get(name)
            return match[0] if there is None else there if divisor is None else f"{float(there) / int(divisor):g}"

        def option(given: Any) -> Any:
            return _CHOSEN.sub(value, given) if isinstance(given, str) else given

        arms = {name: {key: option(given) for key, given in arm.items()} for name, arm in self.arms.items()}
        return replace(self, arms=arms)

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def seeds_for(self, comparison: Comparison) -> int:
        """How many are planned for all of its arms."""
        return min(self.seeds_of.get(arm, self.seeds) for arm in comparison.arms)

    def job(self, arm: str, seed: int) -> Job:
        own = {} if self.dtype is None else {"dtype": self.dtype}
        return job_of(self.size, own | dict(self.arms[arm]), seed)

    def jobs(self) -> list[Job]:
        """All of them, a seed's before the next one's, so that what is there is always paired; none while a value of
        one of its arms is open."""
        return [] if self.frontiers else self.planned()

    def planned(self) -> list[Job]:
        """The same, those whose value is open too: they cannot be run yet."""
        return [
            self.job(arm, seed)
            for number, seed in enumerate(self.all_seeds)
            for arm in self.arms
            if number < self.seeds_of.get(arm, self.seeds)
        ]


def job_of(size: str, arm: Mapping[str, Any], seed: int) -> Job:
    return Job(tuple(sorted({**SIZES[size], **arm, "seed": seed}.items())))


def claim_names() -> list[str]:
    """The claims, main ones first."""
    names = (file.name for file in _FOLDER.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_claim(name: str) -> Claim:
    if name not in claim_names():
        raise UsageError(f"CLAIM must be all or one of {', '.join(claim_names())}: got {name!r}.")
    return parse_claim(name, read_toml(_FOLDER / f"{name}.toml"))


def parse_claim(name: str, content: Mapping[str, Any]) -> Claim:
    """The claim that a file's content says; an error names what is missing or cannot be."""
    wanted = {"title", "source", "paper", "size", "seeds", "arms", "primary"}
    _keys(name, content, wanted, wanted | {"also", "note", "first_seed", "dtype"})
    if content["size"] not in SIZES:
        raise EquipoiseError(f"claim {name}: size must be one of {', '.join(SIZES)}: got {content['size']!r}.")
    if content.get("dtype", DTYPES[0]) not in DTYPES:
        raise EquipoiseError(f"claim {name}: dtype must be one of {', '.join(DTYPES)}: got {content['dtype']!r}.")
    if not isinstance(content["seeds"], int) or content["seeds"] < 2:
        raise EquipoiseError(f"claim {name}: seeds must be a whole number from 2: got {content['seeds']!r}.")
    arms = {arm: dict(options) for arm, options in content["arms"].items()}
    seeds_of = {arm: options.pop("seeds") for arm, options in arms.items() if "seeds" in options}
    for arm, options in arms.items():
        if "strategy" not in options:
            raise EquipoiseError(f"claim {name}: arm {arm} must have a strategy: it has {', '.join(options)}.")
    for arm, seeds in seeds_of.items():
        if not isinstance(seeds, int) or not 2 <= seeds < content["seeds"]:
            raise EquipoiseError(
                f"claim {name}: seeds of arm {arm} must be a whole number from 2, less than the {content['seeds']} of "
                f"the claim: got {seeds!r}."
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
    _keys(name, content, {"statistic", "claim"} | ends, {"statistic", "claim"} | ends | margin)
    found = Comparison(**content)
    if found.claim not in ("lower", "higher", "equal"):
        raise EquipoiseError(f"claim {name}: claim must be lower, higher or equal: got {found.claim!r}.")
    if found.claim == "equal" and found.margin is None and found.statistic not in _LOSSES:
        raise EquipoiseError(f"claim {name}: {found} must have a margin: only losses have one by default.")
    for arm in found.arms:
        if arm not in arms:
            raise EquipoiseError(f"claim {name}: {found} must be of its arms {', '.join(arms)}: got {arm!r}.")
    return found


def _keys(name: str, content: Mapping[str, Any], wanted: set[str], known: set[str]) -> None:
    if missing := wanted - set(content):
        raise EquipoiseError(f"claim {name}: {', '.join(sorted(missing))} must be there: it is not.")
    if unknown := set(content) - known:
        raise EquipoiseError(f"claim {name}: {', '.join(sorted(unknown))} is nothing that a claim has.")
