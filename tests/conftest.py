import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # there is no GPU

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_clean_compiler():
    """Tests run side by side, so one thread each; compiled graphs do not outlive a module's models."""
    torch.set_num_threads(1)
    yield


SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}


@pytest.fixture(autouse=True)
def _signal_handlers_end_with_the_test():
    """A command installs handlers, and a stop that one test asked for must not stop the next."""
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
