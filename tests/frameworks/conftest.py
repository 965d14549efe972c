"""Tests of a framework run in its own environment only: ``make test-frameworks``."""

import os

if "EQUIPOISE_FRAMEWORK" not in os.environ:
    collect_ignore_glob = ["*.py"]
