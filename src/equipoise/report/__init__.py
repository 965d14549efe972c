"""The report: run folders in, one page out. Imports no torch.

    find_runs -> reading -> summary (table, sentences), figures (curves, heat maps) -> page

``write_report(folder)`` writes ``report.html``; ``summary_rows(runs)`` and ``COLUMNS`` are the table, also for
the terminal.
"""

from equipoise.report.page import write_report
from equipoise.report.summary import COLUMNS, Column, summary_rows

__all__ = ["COLUMNS", "Column", "summary_rows", "write_report"]
