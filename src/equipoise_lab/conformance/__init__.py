"""A conformance suite for load balancing: the same questions to every framework, with answers from float64 loops.

equipoise conformance torchtitan
equipoise conformance megatron global-batch-two-ranks
"""

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, NotTried, Refuses, StepResult
from equipoise_lab.conformance.measure import Measurement
from equipoise_lab.conformance.runner import FRAMEWORKS, Verdict, ask, run

__all__ = [
    "Batch", "Driver", "FRAMEWORKS", "Layer", "Measurement", "NotOffered", "NotTried", "Refuses", "StepResult",
    "Verdict", "ask", "run",
]  # fmt: skip
