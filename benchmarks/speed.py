"""Writes what balancing costs (docs/evidence/speed.md) and how fast the lab is (speed_lab.md) from the stored results.

    make bench                            # measures, then writes the pages
    python benchmarks/speed.py            # writes the pages
    python benchmarks/speed.py --check    # fails if a page is not what the stored results give

An older `overhead.json` may lack alerts and collectives: the page then leaves them out. Anything else missing is an
error. The scripts that measured `lab_step.json` and `attention.json` were removed; only their results are left.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from page_parts import Section, Target, anchor, explain_misses, format_verdict, source_table, table
from speed_costs import MEMORY_ON_RANKS, alerts, balancing, collectives, memory_and_start, operations, routers, updates
from speed_lab import alternatives, experts, step_parts, trainer

from equipoise_lab.records import read_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evidence" / "speed.md"
LAB_PAGE = PAGE.with_name("speed_lab.md")
RESULT_NAMES = (
    "overhead",
    "operations",
    "experts",
    "trainer",
    "lab_step",
    "attach",
    "audit",
    "attention",
    "rank_costs",
)
Results = dict[str, dict[str, Any]]

INTRODUCTION = [
    "# What balancing costs",
    "",
    "This page says what balancing costs in time, operations and memory. [How fast `nn.MoE` and the lab "
    "are](speed_lab.md) is a page of its own. Everything was measured on CPUs. [On a GPU](gpu.md) says what has been "
    "seen there.",
    "",
    "Candidates that are compared run in turn, so other work on the machine affects them alike. A ratio is the median "
    "of the ratios of neighbouring runs. Brackets hold its 95 % interval of order statistics, or the extremes if there "
    "are too few rounds for that. Where they hold quartiles, the table says so.",
    "",
]
LAB_INTRODUCTION = [
    "# How fast `nn.MoE` and the lab are",
    "",
    "This page says how fast the library's own MoE layer is, how fast the lab trains, and where its time goes. "
    "Everything was measured on CPUs. Ratios and brackets are those of [What balancing costs](speed.md), which also "
    "has all [targets](speed.md#targets).",
    "",
]
BY_HAND = "Do not edit this page by hand: `python benchmarks/speed.py` writes it from these results. "


def targets_table(targets: Iterable[tuple[Target, str]]) -> list[str]:
    """``targets``: each with a link to its section, or nothing."""
    return table(
        ("", "measured", "target", "", "section"),
        ((target.name, target.measured, target.limit, format_verdict(target.is_met), link) for target, link in targets),
    )


def sections_of_costs(stored: Results) -> list[Section]:
    overhead = stored["overhead"]
    sections = [
        balancing(overhead),
        routers(overhead),
        operations(stored["operations"]),
        updates(overhead),
        alerts(overhead),
        collectives(overhead, stored["rank_costs"]),
        MEMORY_ON_RANKS,
    ]
    return [section for section in sections if section is not None]


def sections_of_lab(stored: Results) -> list[Section]:
    return [
        experts(stored["experts"]),
        trainer(stored["trainer"]),
        step_parts(stored["lab_step"]),
        alternatives(stored["lab_step"], stored["attention"]),
    ]


def costs_page(stored: Results) -> str:
    sections = sections_of_costs(stored)
    without_section = memory_and_start(stored["overhead"], stored["attach"], stored["audit"])
    targets = [
        *((target, link(section)) for section in sections for target in section.targets),
        *((target, "") for target in without_section),
        *((target, link(section, LAB_PAGE.name)) for section in sections_of_lab(stored) for target in section.targets),
    ]
    num_met = sum(target.is_met for target, _ in targets)
    return "\n".join(
        [
            *INTRODUCTION,
            "## Targets",
            "",
            f"Of {len(targets)} targets, {num_met} are met and {len(targets) - num_met} are missed. Each section gives "
            "the reason for a miss.",
            "",
            *targets_table(targets),
            *explain_misses(without_section),
            *(line for section in sections for line in (f"## {section.title}", "", *section.lines)),
            "## Where the figures come from",
            "",
            f"{BY_HAND}`make bench` measures them, but for steps on ranks. All are in "
            "[benchmarks/results](../../benchmarks/results).",
            "",
            *source_table(
                (
                    ("steps, routers, `step()` on one and two ranks, alerts, start, memory", stored["overhead"]),
                    ("operations and bytes", stored["operations"]),
                    ("steps on ranks, growth", stored["rank_costs"]),
                    ("`attach`", stored["attach"]),
                    ("audits", stored["audit"]),
                )
            ),
        ]
    )


def lab_page(stored: Results) -> str:
    return "\n".join(
        [
            *LAB_INTRODUCTION,
            *(line for section in sections_of_lab(stored) for line in (f"## {section.title}", "", *section.lines)),
            "## Where the figures come from",
            "",
            f"{BY_HAND}`make bench` measures the first two. `lab_step.py` and `attention.py` were removed after they "
            "had answered their questions: commit `da71248` is the last one that has them. All are in "
            "[benchmarks/results](../../benchmarks/results).",
            "",
            *source_table(
                (
                    ("experts", stored["experts"]),
                    ("the lab beside the Trainer", stored["trainer"]),
                    ("parts of a step, choices of the lab", stored["lab_step"]),
                    ("attention", stored["attention"]),
                )
            ),
        ]
    )


def link(section: Section, page: str = "") -> str:
    return f"[{section.title}]({page}#{anchor(section.title)})"


def pages(stored: Results) -> dict[Path, str]:
    return {PAGE: costs_page(stored), LAB_PAGE: lab_page(stored)}


def results() -> Results:
    return {name: read_json(RESULTS / f"{name}.json") for name in RESULT_NAMES}


def write() -> None:
    for path, text in pages(results()).items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="only compare the pages with the stored results")
    if options.parse_args().check:
        for path, text in pages(results()).items():
            if text != path.read_text():
                sys.exit(
                    f"{path.relative_to(ROOT)} must match benchmarks/results, and does not: run python "
                    "benchmarks/speed.py."
                )
        return
    write()


if __name__ == "__main__":
    main()
