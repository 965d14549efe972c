"""What can be said of torchtitan without it. Its own tests are in tests/frameworks."""

import importlib.util

import pytest

from equipoise.integrations.framework_import import explained
from equipoise.integrations.torchtitan import balanced

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is not None, reason="torchtitan is installed")


def test_balanced_says_what_is_not_installed():
    with pytest.raises(ImportError, match="balanced needs torchtitan, .*: pip install torchtitan"):
        balanced(object(), "loss-free")


def test_another_version_of_a_framework_is_not_called_missing():
    def fail(error):
        with explained("X", "equipoise_lib", "lib", "2.0"):
            raise error

    with pytest.raises(ImportError, match=r"X needs lib 2.0 or newer: .* lacks a part of equipoise_lib.part \("):
        fail(ModuleNotFoundError("No module named 'equipoise_lib.part'", name="equipoise_lib.part"))
    with pytest.raises(ImportError, match="X needs other, which is not installed: pip install lib"):
        fail(ModuleNotFoundError("No module named 'other'", name="other"))
    with pytest.raises(ImportError, match="^ours$"):
        fail(ImportError("ours", name="equipoise.balance"))
