"""The report: run folders or an audit in, one page out. Imports no torch.

    read_records -> figures, words (who won) -> page

``write_report(folder)`` writes ``report.html``.
"""

from equipoise_lab.report.page import write_report

__all__ = ["write_report"]
