"""The report: one self-contained page, ``report.html``, from run folders or from an audit. Imports no torch.

read_records -> figures, findings (who won) -> page
"""

from equipoise_lab.report.page import write_report

__all__ = ["write_report"]
