"""What a stopped run or comparison says: from which step ``--resume`` goes on."""

from collections.abc import Sequence

from equipoise_lab.records import Run, is_new
from equipoise_lab.train.checkpoint import CHECKPOINTS, newest_step
from equipoise_lab.train.config import Train

__all__ = ["resume_advice", "resume_advice_of_all"]

MOST_NAMED = 4  # runs of a comparison that are named with their step


def resume_advice(config: Train) -> str:
    """How to go on with a run that was stopped. Only rank 0 can know."""
    if _is_complete(config):
        return "The run is complete."
    saved = newest_step(config.out / CHECKPOINTS)
    if saved == config.steps:
        return f"All {saved} steps are trained. To evaluate the model, run the same command with --resume."
    if saved:
        return (
            f"The newest checkpoint is of step {saved}. "
            f"To continue with step {saved + 1}, run the same command with --resume."
        )
    return "There is no checkpoint yet. To begin again with step 1, run the same command with --resume."


def resume_advice_of_all(runs: Sequence[Train]) -> str:
    """How to go on with a comparison that was stopped. Only rank 0 can know."""
    complete = [run for run in runs if _is_complete(run)]
    begun = [(run, newest_step(run.out / CHECKPOINTS)) for run in runs if run not in complete]
    named = [_place(run, saved) for run, saved in begun if saved]
    places = ", ".join(named[:MOST_NAMED]) + (f" and {len(named) - MOST_NAMED} more" if named[MOST_NAMED:] else "")
    count = f"{len(complete)} of {len(runs)} runs are complete"
    if len(complete) == len(runs):
        return f"{count}. To write the report, run the same command with --resume."
    if not named:
        return f"{count}, and no other has a checkpoint yet. To continue, run the same command with --resume."
    return f"{count}. To continue with {places}, run the same command with --resume."


def _place(run: Train, saved: int) -> str:
    name = f"{run.label}, seed {run.seed}" if run.seed else run.label
    return f"the evaluation of {name}" if saved == run.steps else f"step {saved + 1} of {name}"


def _is_complete(config: Train) -> bool:
    return not is_new(config.out) and Run(config.out).complete
