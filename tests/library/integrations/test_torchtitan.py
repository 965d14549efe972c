"""What can be said of torchtitan without it. Its own tests are in tests/frameworks."""

import importlib.util

import pytest

from equipoise.integrations.torchtitan import balanced

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is not None, reason="torchtitan is installed")


def test_balanced_says_what_is_not_installed():
    with pytest.raises(ImportError, match="balanced needs torchtitan, .*: pip install torchtitan"):
        balanced(object(), "loss-free")
