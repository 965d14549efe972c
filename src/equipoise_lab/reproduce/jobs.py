"""Jobs: single runs of `equipoise train`. Equal options, equal job. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Job", "job_of", "key_of"]


@dataclass(frozen=True)
class Job:
    """One run that a claim or a frontier needs: options of ``equipoise train``, with a seed."""

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


def job_of(shared: Mapping[str, Any], arm: Mapping[str, Any], seed: int) -> Job:
    """The run of an arm and a seed; ``shared`` are the options of its size."""
    return Job(tuple(sorted({**shared, **arm, "seed": seed}.items())))


def key_of(job: Job) -> str:
    """A hash of the options of a run: equal options, equal key."""
    return hashlib.blake2b(json.dumps(job.options).encode(), digest_size=8).hexdigest()
