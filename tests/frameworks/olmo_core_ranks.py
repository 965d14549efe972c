"""What each rank of a training under OLMo-core runs."""

import copy
import os
from pathlib import Path

import olmo_core.distributed.parallel as parallel
from frameworks.olmo_core_models import make_batches, make_model, make_trainer, whole


def train_rank(rank, folder, wrapper, strategies, lengths, gamma):
    """By strategy, the recorder of a training on batches of the rank's own; the weights that it began with."""
    os.environ |= {"OLMO_SHARED_FS": "1", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    results, start = {}, {}
    for number, strategy in enumerate(strategies):
        parallel._WORLD_MESH = None  # it makes one in a process
        model = make_model(gamma=gamma)
        batches = make_batches(len(lengths[rank]), rank=rank, lengths=lengths[rank])
        trainer, recorder = make_trainer(
            model, batches, Path(folder) / str(number), strategy, wrapper=wrapper, trainer={"no_checkpoints": True}
        )
        start = copy.deepcopy({name: whole(value) for name, value in model.state_dict().items()})
        trainer.fit()
        results[strategy] = recorder.gradients, recorder.loads, recorder.biases, recorder.tokens, recorder.logged
    return results, start
