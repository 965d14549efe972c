"""The Trainer's frames say which Trainer trains, and from which checkpoint; if they do not, nothing is guessed."""

from pathlib import Path

import pytest
from transformers import Trainer

from equipoise.errors import EquipoiseError
from equipoise.integrations.trainer.stack import find_calling_trainer


class _Trainer(Trainer):
    def __init__(self):
        pass

    def train(self, resume_from_checkpoint=None):
        return self.event()

    def train_of_tomorrow(self, checkpoint=None):
        return self.event()

    def event(self):
        return find_calling_trainer()


@pytest.mark.parametrize(("checkpoint", "found"), [(None, None), ("a/b", Path("a/b")), (Path("c"), Path("c"))])
def test_the_trainer_and_its_checkpoint_are_read_from_the_stack(checkpoint, found):
    trainer = _Trainer()
    assert trainer.train(checkpoint) == (trainer, found)


def test_without_a_trainer_there_is_no_checkpoint():
    assert find_calling_trainer() == (None, None)


@pytest.mark.parametrize("train", [lambda: _Trainer().train_of_tomorrow("a/b"), lambda: _Trainer().train(True)])
def test_a_trainer_that_does_not_say_where_it_begins_is_refused(train):
    """Its state would be left behind without a word."""
    with pytest.raises(EquipoiseError, match="must have a variable resume_from_checkpoint"):
        train()
