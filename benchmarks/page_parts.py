"""What the pages of several benchmarks are made of: tables, targets, and where a measurement comes from."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

UNKNOWN_REASON = "The reason is not known."
MOST_CORES_OF_OTHERS = 0.2  # above it the page warns that other programs disturbed the measurement


class Target(NamedTuple):
    """A limit that a measurement must keep. ``reason`` explains a miss, ``label`` names the target in its section."""

    name: str
    measured: str
    limit: str
    is_met: bool
    reason: str = UNKNOWN_REASON
    label: str = ""


class Section(NamedTuple):
    title: str
    lines: list[str]
    targets: Sequence[Target] = ()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(header), "|---" * len(header) + "|", *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_versions(stored: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in stored["versions"].items())


def source_line(stored: dict[str, Any]) -> list[str]:
    return [f"`{stored['command']}`, {stored['hardware']}, {stored['date']}, {format_versions(stored)}.", ""]


def source_table(results: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """Where the results of a page come from. ``results``: what each measures, and what is stored of it."""
    rows = (
        (what, f"`{stored['command']}`", stored["hardware"], stored["date"], format_versions(stored))
        for what, stored in results
    )
    return table(("measured", "command", "machine", "date", "versions"), rows)


def disturbance_note(stored: dict[str, Any]) -> list[str]:
    """A sentence, if other programs ran during a measurement."""
    cores = stored["cores_of_others"]
    if cores is None or cores < MOST_CORES_OF_OTHERS:
        return []
    return [
        f"Other programs took {cores:.1f} cores of this machine during the measurement. So times are too long, and "
        "rows with several threads cannot be trusted.",
        "",
    ]


def format_ratio(ratio: dict[str, float], digits: int = 3) -> str:
    """A median with its interval."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def format_verdict(is_met: bool | None) -> str:
    return "" if is_met is None else "met" if is_met else "**missed**"


def explain_misses(targets: Sequence[Target]) -> list[str]:
    """Each reason, after the targets that are missed for it. They are not named if the section has no others.

    >>> first, second = (Target(name, "3", "2", False, "It is hard.", f"`{name}`") for name in "ab")
    >>> explain_misses([first, second])
    ['**Missed (target: 2).** It is hard.', '']
    >>> explain_misses([first, second._replace(is_met=True)])
    ['**Missed: `a` (target: 2).** It is hard.', '']
    """
    missed_by_reason: dict[str, list[Target]] = {}
    for target in targets:
        if not target.is_met:
            missed_by_reason.setdefault(target.reason, []).append(target)
    lines = []
    for reason, missed in missed_by_reason.items():
        if len(missed) == len(targets):
            what = f" (target: {', '.join(dict.fromkeys(target.limit for target in missed))})"
        else:
            what = ": " + ", ".join(f"{target.label or target.name} (target: {target.limit})" for target in missed)
        lines += [f"**Missed{what}.** {reason}", ""]
    return lines


def anchor(title: str) -> str:
    """
    >>> anchor("`step()`"), anchor("A router's forward")
    ('step', 'a-routers-forward')
    """
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")
