"""What can be said of Megatron-Core without it. Its own tests are in tests/frameworks."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from equipoise.integrations.megatron import attach

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is not None, reason="Megatron-Core is installed")


def test_attach_says_what_is_not_installed():
    with pytest.raises(ImportError, match="pip install megatron-core"):
        attach(torch.nn.Linear(2, 2), "loss-free")


def test_reading_its_routers_imports_no_framework():
    code = "import sys, equipoise.integrations.megatron as m; m.ROUTER_ADAPTERS; print('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
