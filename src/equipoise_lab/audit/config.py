"""The options of `equipoise audit`. Imports little, because every call of the command line loads this."""

from dataclasses import dataclass
from pathlib import Path

from equipoise.errors import UsageError
from equipoise_lab.train.location import check_location

__all__ = ["Audit"]


@dataclass(frozen=True)
class Audit:
    """The options of `equipoise audit`."""

    model: Path
    data: str = "corpus"
    tokens: int = 100_000
    out: Path = Path("runs/audit")
    sequence_length: int | None = None  # None: 512, or the model's maximum if that is less
    batch: int = 8
    json: bool = False
    text_key: str = "text"

    def check(self) -> None:
        for name, minimum in (("tokens", 1), ("sequence_length", 2), ("batch", 1)):
            if getattr(self, name) is not None and getattr(self, name) < minimum:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {minimum}: got {getattr(self, name)}.")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out must be a folder: {self.out} is a file. Choose another.")
        check_location(self.data)
