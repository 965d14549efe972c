"""The options of `equipoise reproduce`. Imports little: every call of the command line imports it."""

from dataclasses import dataclass
from pathlib import Path

from equipoise.errors import UsageError, suggest
from equipoise_lab.reproduce.claim import DTYPES
from equipoise_lab.reproduce.edition import DEFAULT, Edition, load_edition

__all__ = ["RESULTS", "Reproduce"]


RESULTS = Path("benchmarks/results/claims")


@dataclass(frozen=True)
class Reproduce:
    """The options of `equipoise reproduce`; its help says what they mean."""

    claim: str = "all"
    edition: str = DEFAULT
    budget: float | None = None  # minutes
    out: Path = Path("runs/reproduce")
    results: Path = RESULTS
    workers: int = 0  # 0: one for each core
    dtype: str | None = None  # None: as the claims say
    page: Path | None = None
    json: bool = False

    def load_edition(self) -> Edition:
        return load_edition(self.edition)

    @property
    def needs_bfloat16(self) -> bool:
        """Whether some runs would be in bfloat16."""
        sizes = self.load_edition().sizes.values()
        return self.dtype is None and any(size.get("dtype") == "bfloat16" for size in sizes)

    def check(self) -> None:
        names = list(self.load_edition().claims)
        if self.claim != "all" and self.claim not in names:
            near = suggest(self.claim, names)
            command = f"equipoise reproduce --edition {self.edition} --budget 0"
            listed = f"the {len(names)} that `{command}` lists" if near else ", ".join(names)
            raise UsageError(f"CLAIM must be all or one of {listed}: got {self.claim!r}.{near}")
        if self.budget is not None and not 0 <= self.budget < float("inf"):
            raise UsageError(f"--budget must be a number of minutes, at least 0: got {self.budget}.")
        if self.workers < 0:
            raise UsageError(f"--workers must be at least 0 (one for each core): got {self.workers}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}: got {self.dtype}.")
        for name in ("out", "results"):
            folder = getattr(self, name)
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"--{name} must be a folder: {folder} is a file. Choose another.")
        if self.page is not None and self.claim != "all":
            raise UsageError(
                f"--page must go with all claims: got only {self.claim}. Leave out --page or {self.claim}."
            )
        if self.page is not None and self.page.is_dir():
            raise UsageError(f"--page must be a file: {self.page} is a folder. Write {self.page / 'claims.md'}.")
