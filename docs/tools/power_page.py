"""Writes the tables of docs/evidence/power.md from the stored results: ``python docs/tools/power_page.py``."""

import statistics
import sys
from pathlib import Path

from generated import REFERENCE, main, table

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import power

PAGE = REFERENCE.parent / "evidence" / "power.md"


def markdown() -> dict[str, str]:
    """The generated parts of the page, by the name of their marker."""
    rows = power.rows()
    whole_text = [row for row in rows if row["sequences"] == max(power.SEQUENCES)]
    return {
        "recipes": _table([row for row in whole_text if row["averaged"] == 0]),
        "averages": _table([row for row in whole_text if row["averaged"]], with_share=True),
        "texts": _table([row for row in rows if row["averaged"] == 0 and row["sequences"] != max(power.SEQUENCES)]),
        "control variates": _control_variates(),
    }


def _table(rows: list[dict], with_share: bool = False) -> str:
    averaged = ("averaged",) if with_share else ()
    head = ("recipe", *averaged, "loss", "difference", "its sd", "core-minutes a run", "efficiency")
    cells = [
        (
            row["recipe"],
            *((f"{100 * row['averaged']:.0f} %",) if with_share else ()),
            f"{row['loss']:.3f}",
            f"{row['mean']:+.4f}".replace("-", "−"),
            f"{row['sd']:.4f}",
            f"{30 * row['core_hours']:.1f}",  # of two arms
            f"{row['efficiency']:.2g}",
        )
        for row in rows
    ]
    return table(head, cells)


def _control_variates() -> str:
    shares = power.control_variates()
    return (
        f"The first edition's leaderboard has {len(shares)} pairs of arms. The loss of the unbalanced run with the "
        f"same seed explains\n{100 * statistics.median(shares):.0f} % of the variance of their difference (median of "
        "the adjusted R²)."
    )


if __name__ == "__main__":
    main(PAGE, markdown())
