"""What is wrong with a text, and what of it was left out: collected, then said in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from equipoise.errors import EquipoiseError, UsageError

__all__ = ["Problem", "Problems", "Skipped"]

MOST_NAMED = 10  # problems that an error describes
MOST_FILES = 3  # skipped files that a note names, for each reason


class Problem(Exception):
    """Something about a text that must be mended. Never leaves this package: :class:`Problems` makes an error of it."""

    def __init__(self, rule: str, case: str, remedy: str, *, in_use: bool = False):
        super().__init__(f"{rule}: {case}. {remedy}")
        self.rule, self.case, self.remedy = rule, case, remedy
        self.in_use = in_use  # a wrong option or folder, not a damaged file


class Problems:
    """The problems of a text. All of them become one error."""

    def __init__(self) -> None:
        self.all: list[Problem] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collects a problem that is raised inside."""
        try:
            yield
        except Problem as problem:
            self.all.append(problem)

    def add(self, rule: str, case: str, remedy: str, *, in_use: bool = False) -> None:
        self.all.append(Problem(rule, case, remedy, in_use=in_use))

    def raise_error(self) -> None:
        """Raises an error that names all problems, those with the same rule and remedy together. Without any: nothing.

        >>> problems = Problems()
        >>> for name in ("a", "b"):
        ...     problems.add("Text must be UTF-8", f"{name} is not", "Convert it.")
        >>> problems.raise_error()
        Traceback (most recent call last):
        equipoise.errors.EquipoiseError: Text must be UTF-8: a is not; b is not. Convert it.
        """
        if not self.all:
            return
        groups: dict[tuple[str, str], list[str]] = {}
        for problem in self.all[:MOST_NAMED]:
            groups.setdefault((problem.rule, problem.remedy), []).append(problem.case)
        text = " ".join(f"{rule}: {'; '.join(cases)}. {remedy}" for (rule, remedy), cases in groups.items())
        if more := len(self.all) - MOST_NAMED:
            text += f" And {more} more of {len(self.all)} problems." if more > 0 else ""
        raise (UsageError if all(problem.in_use for problem in self.all) else EquipoiseError)(text)


class Skipped:
    """The files of a text that were left out, and why."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}  # by file

    def add(self, name: str, reason: str) -> None:
        self.reasons[os.fsencode(name).decode(errors="replace")] = reason

    def note(self) -> str | None:
        """A line that counts the files by reason and names some; None if there are none.

        >>> skipped = Skipped()
        >>> for name in ("a.png", "b.png"):
        ...     skipped.add(name, "not text")
        >>> skipped.note()
        'skipped 2 files: 2 not text (a.png, b.png)'
        """
        if not self.reasons:
            return None
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [
            f"{len(names):,} {reason} ({', '.join(names[:MOST_FILES])}{', ...' if names[MOST_FILES:] else ''})"
            for reason, names in by_reason.items()
        ]
        return f"skipped {len(self.reasons):,} file{'s' * (len(self.reasons) > 1)}: {', '.join(parts)}"
