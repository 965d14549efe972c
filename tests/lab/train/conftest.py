"""A tiny text with three domains, a run on it that takes seconds, and a watcher that records."""

import random
from dataclasses import replace

import pytest

from equipoise_lab.train.config import Train

WORDS = {
    "fruit": "apple pear plum cherry grape melon fig lemon lime peach",
    "metal": "iron copper zinc silver gold lead tin nickel cobalt steel",
    "river": "rhine danube elbe seine loire tagus volga thames ebro po",
}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with one .txt per domain, 60 documents each."""
    folder = tmp_path_factory.mktemp("text")
    for name, words in WORDS.items():
        draw = random.Random(name)
        documents = [" ".join(draw.choices(words.split(), k=60)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny(text, tmp_path):
    config = Train(
        out=tmp_path / "run",
        data=str(text),
        strategy="loss-free:rate=1e-2+lbl:scope=global_batch",
        vocab_size=300,
        steps=12,
        layers=1,
        width=32,
        experts=4,
        experts_per_token=2,
        expert_width=16,
        sequence_length=16,
        sequences=2,
        micro_batches=3,
        evaluation_sequences=8,
        checkpoint_every=5,
        dtype="float32",
    )
    return lambda **options: replace(config, **options)


class RecordingWatcher:
    """Records the progress of a run. Stops the run after the step ``stop_after``."""

    def __init__(self, stop_after=None):
        self.said, self.rows, self.speeds, self.stop_after = [], [], [], stop_after

    def say(self, text):
        self.said.append(text)

    def begin(self, config, done):
        self.done = done

    def step(self, row, tokens_per_second):
        self.rows.append(row)
        self.speeds.append(tokens_per_second)
        if row["step"] == self.stop_after:
            raise KeyboardInterrupt

    def end(self):
        pass

    def add_run(self):
        return self


@pytest.fixture
def new_watcher():
    return RecordingWatcher
