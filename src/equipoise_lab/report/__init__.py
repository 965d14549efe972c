"""The report: one self-contained page, ``report.html``, from run folders or from an audit. Imports no torch.

read_records ──> figures, findings (who won) ──> contents ──> page, with stills for browsers without JavaScript
                                                      └────> browser_data, for the scripts of the page
"""

from equipoise_lab.report.live import write_live
from equipoise_lab.report.page import write_report

__all__ = ["write_live", "write_report"]
