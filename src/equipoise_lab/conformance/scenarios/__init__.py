"""The scenarios, by area. Importing this registers them."""

from equipoise_lab.conformance.scenarios import loss  # isort: skip  (the order of the table)
from equipoise_lab.conformance.scenarios import global_batch  # isort: skip
from equipoise_lab.conformance.scenarios import counting  # isort: skip
from equipoise_lab.conformance.scenarios import bias  # isort: skip
from equipoise_lab.conformance.scenarios import choice  # isort: skip
from equipoise_lab.conformance.scenarios import metrics  # isort: skip
from equipoise_lab.conformance.scenarios.scenario import SCENARIOS, Scenario

__all__ = ["SCENARIOS", "Scenario", "bias", "choice", "counting", "global_batch", "loss", "metrics"]
