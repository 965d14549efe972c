"""Editions: each owns its sizes, frontiers, claims, pages and results, and shares none of them. Imports no torch.

An edition is a folder in ``editions``:

    sizes.toml        recipe = 1, the version of the recipe; and by name of a size the options that its arms share
    frontiers.toml    what ``frontier.py`` says
    claims/*.toml     what ``claim.py`` says, one file per claim
    page.toml         what ``PageText`` says

Its results are in a folder of its name. Once an edition has results, its files stay as they are: change ``recipe`` if
results must be made again, and begin another edition for other questions.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError, UsageError, suggest
from equipoise_lab.reproduce.arms import Choice, needs
from equipoise_lab.reproduce.claim import Claim, parse_claim
from equipoise_lab.reproduce.frontier import Frontier, parse_frontiers
from equipoise_lab.reproduce.results import Results

__all__ = ["DEFAULT", "Edition", "PageText", "edition_names", "load_edition"]

EDITIONS = Path(__file__).parent / "editions"
NAMES = ("first", "second", "third", "fourth")  # oldest first; those that have a folder exist
DEFAULT = "first"  # the newest whose runs are done


@dataclass(frozen=True)
class PageText:
    """What the pages say of an edition beside its figures: the file ``page.toml``.

    In these texts ``{results}``, ``{runs}`` and ``{PART}`` are addresses of the pages. In ``head``, ``{CLAIM}`` is the
    difference that the first comparison of a claim shows, with its interval.
    """

    path: str  # of the page of verdicts, in the repository
    figure: str  # of the frontiers and the leaderboard, in the repository
    leaderboard: str  # the claim with a table of all its arms
    head: str  # of the page of verdicts
    reading: str  # how to read it
    sources: str  # of arms that are not of the library
    limits: str
    frontier_seeds: str  # a sentence on claims that use the seeds of the frontiers, or ""
    parts: Mapping[str, Mapping[str, Any]]  # by name of a page of details: head, and how the names of its claims begin
    details: str  # below the head of each page of details
    runs: str  # head of the page of frontiers, noise and runs
    claim_figures: Mapping[str, str] = field(default_factory=dict)  # by claim: a figure for its details (optional)

    def part_of(self, claim: str) -> str:
        """The part whose page has the details of a claim."""
        parts = [part for part, text in self.parts.items() if claim.startswith(tuple(text["claims"]))]
        if len(parts) != 1:
            raise EquipoiseError(
                f"page.toml: a claim must belong to one of the parts {', '.join(self.parts)}: {claim} belongs to "
                f"{', '.join(parts) or 'none'}."
            )
        return parts[0]


@dataclass(frozen=True)
class Edition:
    """One edition of the evidence. Verdicts, corrections and tables are over the claims of one edition."""

    name: str
    recipe: int  # its version; results of another are ignored
    sizes: Mapping[str, Mapping[str, Any]]
    frontiers: Mapping[str, Frontier]
    claims: Mapping[str, Claim]  # by name; an arm may still need what a frontier chooses
    page: PageText

    def folder(self, root: Path) -> Path:
        """The folder of this edition inside ``root``, a folder for all editions."""
        return root / self.name

    def results(self, root: Path, *other_roots: Path, dtype: str | None = None) -> Results:
        """Its stored results in folders that hold those of all editions."""
        return Results(*map(self.folder, (root, *other_roots)), dtype=dtype, recipe=self.recipe)

    def chosen(self, results: Results) -> dict[str, Choice | None]:
        """What each frontier chose; None while a run of it is missing."""
        return {name: frontier.chosen(results) for name, frontier in self.frontiers.items()}

    def claims_with_values(self, results: Results) -> list[Claim]:
        """All claims, with what the frontiers chose, each at its current look: the last one that has all runs."""
        chosen = self.chosen(results)
        return [_at_current_look(claim.with_values(chosen), results) for claim in self.claims.values()]


def _at_current_look(claim: Claim, results: Results) -> Claim:
    while (later := claim.next_look) is not None and later.jobs() and not results.missing(later.jobs()):
        claim = later
    return claim


def edition_names() -> list[str]:
    """The editions that exist, oldest first."""
    folders = {sizes.parent.name for sizes in EDITIONS.glob("*/sizes.toml")}
    if unknown := folders - set(NAMES):
        raise EquipoiseError(
            f"an edition must have one of the names {', '.join(NAMES)}: {EDITIONS} has {', '.join(sorted(unknown))}."
        )
    return [name for name in NAMES if name in folders]


def load_edition(name: str) -> Edition:
    names = edition_names()
    if name not in names:
        raise UsageError(f"--edition must be one of {', '.join(names)}: got {name!r}.{suggest(name, names)}")
    return _load(EDITIONS / name)


@cache
def _load(folder: Path) -> Edition:
    sizes = _read_toml(folder / "sizes.toml")
    recipe = sizes.pop("recipe", None)
    if not isinstance(recipe, int) or recipe < 1:
        raise EquipoiseError(f"{folder / 'sizes.toml'} must have a recipe, a whole number from 1: got {recipe!r}.")
    frontiers = parse_frontiers(_read_toml(folder / "frontiers.toml"), sizes)
    claims = {}
    names = [file.name for file in (folder / "claims").iterdir() if file.name.endswith(".toml")]
    for name in sorted(name.removesuffix(".toml") for name in names):
        claims[name] = parse_claim(name, _read_toml(folder / "claims" / f"{name}.toml"), sizes, folder.name)
        _check_needs(claims[name], frontiers)
    text = _read_toml(folder / "page.toml")
    required = {key.name for key in fields(PageText) if key.default_factory is MISSING}
    if wrong := (set(text) | required) - (set(text) & {key.name for key in fields(PageText)}):
        raise EquipoiseError(f"{folder / 'page.toml'} lacks these keys, or has them and must not: {', '.join(wrong)}.")
    page = PageText(**text)
    for name in claims:
        page.part_of(name)
    return Edition(folder.name, recipe, sizes, frontiers, claims, page)


def _check_needs(claim: Claim, frontiers: Mapping[str, Frontier]) -> None:
    """Raises ``EquipoiseError`` if an arm takes from a frontier what it does not choose."""
    for arm, options in claim.arms.items():
        for need in needs(options):
            frontier = frontiers.get(need.frontier)
            if frontier is not None and (shared := set(frontier.seeds) & set(claim.last_look.all_seeds)):
                raise EquipoiseError(
                    f"claim {claim.name}: seeds must not be those of a frontier that it takes from: {need.frontier} "
                    f"was chosen with {', '.join(map(str, sorted(shared)))}."
                )
            if frontier is None:
                problem = f"there is no such frontier, only {', '.join(frontiers)}"
            elif need.what == "value" and not frontier.values:
                problem = "it has no coefficient or rate"
            elif need.what == "learning rate" and frontier.learning_rates is None:
                problem = "it chooses no learning rate: list it in learning_rates"
            else:
                continue
            raise EquipoiseError(
                f"claim {claim.name}: arm {arm} must take what a frontier chooses: it takes {need.what} of "
                f"{need.frontier}, but {problem}."
            )


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise EquipoiseError(f"{file} must be TOML: {error}. Restore the file.") from None
