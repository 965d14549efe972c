"""Claims: what is compared and what would support it, written down before anything is run. Imports no torch.

A claim is a TOML file in the folder ``claims`` of an edition (``edition.py``):

    title = "..."                  one sentence that can be true or false
    source = "..."                 the paper and the place in it
    paper = "..."                  the figures that it reports
    size = "..."                   of ``sizes.toml``: the options that all arms share
    seeds = 8                      0, 1, ..., paired between arms; or
    seeds = [8, 16]                the claim is looked at after 8 seeds, and goes on to 16 if it is undecided then
    note = "..."                   what else a reader must know (optional)

    first_seed = 0                 if the seeds do not start at 0 (optional)
    dtype = "float32"              for all arms, in place of the precision of the size (optional)

    [arms.NAME]                    the options of ``equipoise train`` that this arm adds to those of its size
    strategy = "..."               "{FRONTIER}" stands for the coefficient or rate chosen on a frontier; ``arms.py`` has
                                   all that may be taken from one
    frontier = "..."               in place of a strategy: all that was chosen on this frontier
    seeds = 3                      only the first so many seeds, for an arm without a verdict on a loss (optional)

    [primary]                      the one comparison that decides; [[also]] adds others, for information
    statistic = "val_nats"         a key of a run's result.json, or a difference of two: "val_nats - train_nats"
    of = "NAME"                    the difference is the statistic of this arm
    against = "NAME"               minus that of this arm
    claim = "lower" | "higher" | "equal"
    margin = 0.01                  for "equal" only: smaller differences count as none. By default, for a loss, a third
                                   of the difference between the arms of claim 1-scope
    effect = -0.02                 the difference that the seeds are planned for, as the paper reports it or an earlier
                                   edition saw it (optional); the page says what power they have for it

A trend has ``over = {NAME = 1, NAME = 2, ...}`` instead of ``of`` and ``against``. Its statistic is a slope, seed by
seed, over log2 of these numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise_lab.reproduce.arms import Choice, fill, needs
from equipoise_lab.reproduce.jobs import Job, job_of

__all__ = ["DTYPES", "Claim", "Comparison", "parse_claim"]

DTYPES = ("bfloat16", "float32")
_LOSSES = ("val_nats", "train_nats")
STATISTICS = {  # in a run's result.json
    *_LOSSES, "selection_nats", "val_perplexity", "val_bits_per_byte", "maxvio_global", "maxvio_floor", "maxvio_batch",
    "maxvio_micro", "selection_maxvio", "domain_information_bits", "max_domain_share", "topk_score_sum", "dead_experts",
    "tokens_per_second",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A statistic of two arms, or of several arms over a factor, and the direction that is claimed."""

    statistic: str
    claim: str  # lower, higher, equal
    of: str = ""
    against: str = ""
    over: Mapping[str, float] = field(default_factory=dict)
    margin: float | None = None
    effect: float | None = None  # that the seeds are planned for

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.over) or (self.against, self.of)

    def __str__(self) -> str:
        if self.over:
            return f"{self.statistic} over {', '.join(f'{value:g}' for value in self.over.values())}"
        return f"{self.statistic}, {self.of} − {self.against}"


@dataclass(frozen=True)
class Claim:
    """What a paper claims, and the runs that decide it."""

    edition: str  # whose files and results it belongs to
    name: str
    title: str
    source: str
    paper: str
    size: str
    shared: Mapping[str, Any]  # the options of the size
    seeds: int  # of the current look
    arms: Mapping[str, Mapping[str, Any]]
    primary: Comparison
    also: tuple[Comparison, ...] = ()
    note: str = ""
    first_seed: int = 0
    dtype: str | None = None
    seeds_of: Mapping[str, int] = field(default_factory=dict)  # by arm, for those with fewer than the claim
    looks: tuple[int, ...] = ()  # the numbers of seeds after which it is judged, if there are several

    @property
    def frontiers(self) -> list[str]:
        """The frontiers that its arms still need something from, each once."""
        return list(dict.fromkeys(need.frontier for arm in self.arms.values() for need in needs(arm)))

    def with_values(self, chosen: Mapping[str, Choice | None]) -> "Claim":
        """The claim with what was chosen filled in; what has no choice yet (None) stays."""
        return replace(self, arms={name: fill(arm, chosen) for name, arm in self.arms.items()})

    @property
    def num_looks(self) -> int:
        return max(1, len(self.looks))

    @property
    def next_look(self) -> "Claim | None":
        """The claim with the seeds of the look after this one; None after the last."""
        later = [seeds for seeds in self.looks if seeds > self.seeds]
        return replace(self, seeds=later[0]) if later else None

    @property
    def last_look(self) -> "Claim":
        """The claim with the seeds of its last look."""
        return replace(self, seeds=max((self.seeds, *self.looks)))

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def seeds_for(self, comparison: Comparison) -> int:
        """How many seeds all arms of the comparison are planned to have."""
        return min(self.seeds_of.get(arm, self.seeds) for arm in comparison.arms)

    def job(self, arm: str, seed: int) -> Job:
        precision = {} if self.dtype is None else {"dtype": self.dtype}
        return job_of(self.shared, precision | dict(self.arms[arm]), seed)

    def jobs(self) -> list[Job]:
        """All runs, seed by seed, so that finished runs are always paired; none while an arm still needs a value."""
        return [] if self.frontiers else self.planned()

    def jobs_of(self, arm: str) -> list[Job]:
        """The runs of one arm, even those that cannot start yet."""
        return [self.job(arm, seed) for seed in self.all_seeds[: self.seeds_of.get(arm, self.seeds)]]

    def planned(self) -> list[Job]:
        """All runs, even those that cannot start yet because an arm still needs a value."""
        return [
            self.job(arm, seed)
            for number, seed in enumerate(self.all_seeds)
            for arm in self.arms
            if number < self.seeds_of.get(arm, self.seeds)
        ]


def parse_claim(
    name: str, content: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]], edition: str = ""
) -> Claim:
    """The claim in a file's content. Raises ``EquipoiseError``, which names what is missing or wrong."""
    required = {"title", "source", "paper", "size", "seeds", "arms", "primary"}
    _check_keys(name, content, required, required | {"also", "note", "first_seed", "dtype"})
    if content["size"] not in sizes:
        raise EquipoiseError(f"claim {name}: size must be one of {', '.join(sizes)}: got {content['size']!r}.")
    if content.get("dtype", DTYPES[0]) not in DTYPES:
        raise EquipoiseError(f"claim {name}: dtype must be one of {', '.join(DTYPES)}: got {content['dtype']!r}.")
    looks = content["seeds"] if isinstance(content["seeds"], list) else [content["seeds"]]
    is_rising = all(isinstance(seeds, int) for seeds in looks) and looks == sorted(set(looks))
    if not looks or not is_rising or looks[0] < 2:
        raise EquipoiseError(
            f"claim {name}: seeds must be a whole number of at least 2, or several that rise: got {content['seeds']!r}."
        )
    arms = {arm: dict(options) for arm, options in content["arms"].items()}
    seeds_of = {arm: options.pop("seeds") for arm, options in arms.items() if "seeds" in options}
    for arm, options in arms.items():
        if ("strategy" in options) == ("frontier" in options):
            raise EquipoiseError(
                f"claim {name}: arm {arm} must have either a strategy or a frontier: it has "
                f"{', '.join(options) or 'no option'}."
            )
    for arm, seeds in seeds_of.items():
        if not isinstance(seeds, int) or not 2 <= seeds < looks[-1]:
            raise EquipoiseError(
                f"claim {name}: seeds of arm {arm} must be a whole number of at least 2 and below the "
                f"{looks[-1]} of the claim: got {seeds!r}."
            )
    return Claim(
        edition=edition,
        name=name,
        title=content["title"],
        source=content["source"],
        paper=content["paper"],
        size=content["size"],
        shared=sizes[content["size"]],
        seeds=looks[0],
        looks=tuple(looks) if len(looks) > 1 else (),
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
    required = {"statistic", "claim"} | ends
    _check_keys(name, content, required, required | margin | {"effect"})
    comparison = Comparison(**content)
    if comparison.claim not in ("lower", "higher", "equal"):
        raise EquipoiseError(f"claim {name}: claim must be lower, higher or equal: got {comparison.claim!r}.")
    if comparison.over and (comparison.claim == "equal" or len(set(comparison.over.values())) < len(comparison.over)):
        raise EquipoiseError(
            f"claim {name}: {comparison} must claim lower or higher, over numbers that differ: got {comparison.claim} "
            f"over {dict(comparison.over)}."
        )
    if unknown := set(comparison.statistic.split(" - ")) - STATISTICS:
        raise EquipoiseError(
            f"claim {name}: statistic must be one of {', '.join(sorted(STATISTICS))}, or one less another: got "
            f"{', '.join(sorted(unknown))}."
        )
    if comparison.margin is not None and not comparison.margin > 0:
        raise EquipoiseError(f"claim {name}: margin must be above 0: got {comparison.margin!r}.")
    if comparison.claim == "equal" and comparison.margin is None and comparison.statistic not in _LOSSES:
        raise EquipoiseError(f"claim {name}: {comparison} must have a margin: only losses have one by default.")
    if comparison.effect is not None and not isinstance(comparison.effect, int | float):
        raise EquipoiseError(f"claim {name}: effect must be a number: got {comparison.effect!r}.")
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
