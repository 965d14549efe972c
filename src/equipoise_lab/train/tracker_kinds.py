"""How a run begins and goes on in TensorBoard, Weights & Biases, trackio and MLflow.

The trackers of Accelerate do the rest. Transformers has the same ones only as callbacks of its Trainer; Accelerate's
work in any loop, and it is installed with the lab. Of Accelerate's state a tracker needs to know that this process is
the main one. ``_prepare_accelerate`` says so: left to itself, Accelerate would read torchrun's variables, and could
join the ranks again, set their threads or choose their device.

    tensorboard   events in the run's folder; a resumed run drops the points after its checkpoint
    wandb         one run with an id of its own; a resumed run has the same id
    trackio       one run by name; a resumed run must have the id it had
    mlflow        one run; a resumed run has the same id

A run is named by its folder, and in a comparison ``COMPARISON/FOLDER``.
"""

import contextlib
import io
import os
import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from filelock import FileLock

from equipoise.errors import EquipoiseError
from equipoise_lab.train.config import Train
from equipoise_lab.train.data import cache_folder

__all__ = ["Place", "check_trackers", "finish", "quiet", "start", "where_to_look"]

PROJECT = "equipoise"
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
RANK_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
WANDB_SETTINGS = {"silent": True, "console": "off", "init_timeout": 30.0, "finish_timeout": 300.0}  # seconds
MLFLOW_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # ranks wait for a minute


@dataclass(frozen=True)
class Place:
    """The run in a tracker."""

    folder: Path
    id: str | None  # of the run in this tracker; None: it has none yet
    sent: int  # the last step that the tracker has

    @property
    def group(self) -> str | None:
        """The comparison that the run belongs to."""
        parent = self.folder.resolve().parent
        return parent.name if (parent / "compare.json").is_file() else None

    @property
    def name(self) -> str:
        folder = self.folder.resolve().name
        return folder if self.group is None else f"{self.group}/{folder}"


def check_trackers(config: Train) -> None:
    """Raises EquipoiseError for a tracker that is not installed, or not logged in. Contacts no server."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise EquipoiseError(
                f"--tracker {name} needs the package {name}, and it is not installed. Install it with: "
                f"pip install {name}"
            )
    if config.trackers and find_spec("accelerate") is None:
        raise EquipoiseError(
            "--tracker needs the lab, and accelerate is not installed. In a clone: pip install -e '.[lab]'"
        )
    if "wandb" in config.trackers and not _is_logged_in():
        raise EquipoiseError(
            "--tracker wandb needs a login: got none. Run `wandb login` once, or set WANDB_MODE=offline and upload "
            "later with `wandb sync`."
        )


def _is_logged_in() -> bool:
    import wandb

    with quiet():
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return True
        try:
            return wandb.login(prompt=False, verify=False)
        except TypeError:  # an older version, which always asks at a terminal
            return True
        except Exception:
            return False


def where_to_look(name: str, folder: Path) -> str:
    """One line for the user. ``folder``: of the run, or of the comparison."""
    project = shlex.quote(_project(name))
    if name == "tensorboard":
        return f"tensorboard: watch with: tensorboard --logdir {shlex.quote(str(folder))}"
    if name == "trackio":
        return f"trackio: watch with: trackio show --project {project}"
    if name == "mlflow":
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        return f"mlflow: experiment {project} at {uri}" if uri else "mlflow: watch with: mlflow ui"
    return f"wandb: project {project}; with WANDB_MODE=offline, upload later with: wandb sync"


def _project(name: str) -> str:
    return os.environ.get(PROJECT_VARIABLES.get(name, ""), "") or PROJECT


def start(name: str, place: Place, configuration: Mapping[str, Any], figures: Sequence[str]) -> tuple[Any, str]:
    """Starts the run, or continues it. Returns the tracker and the id of the run in it.

    ``figures``: names of what is logged at the end.
    """
    starts = {"wandb": _start_wandb, "trackio": _start_trackio, "mlflow": _start_mlflow}
    with quiet():
        _prepare_accelerate()
        if name == "tensorboard":
            return _start_tensorboard(place, configuration, figures)
        return starts[name](place, dict(configuration))


def _start_tensorboard(place: Place, configuration: Mapping[str, Any], figures: Sequence[str]) -> tuple[Any, str]:
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard.summary import hparams

    folder = place.folder.resolve()
    purge = {} if place.id is None else {"purge_step": place.sent + 1}
    tracker = TensorBoardTracker(folder.name, logging_dir=folder.parent, **purge)
    tracker.start()
    for summary in hparams(dict(configuration), dict.fromkeys(figures, 0.0)):
        # Accelerate's way would add another run to the list, named by the time.
        tracker.tracker.file_writer.add_summary(summary)
    return tracker, folder.name


def _start_wandb(place: Place, configuration: dict[str, Any]) -> tuple[Any, str]:
    import wandb
    from accelerate.tracking import WandBTracker

    run_id = place.id or uuid.uuid4().hex[:12]
    known = [
        name
        for name in getattr(wandb.Settings, "model_fields", ())
        if f"WANDB_{name.upper()}" not in os.environ  # what the user has set stays
    ]
    tracker = WandBTracker(
        _project("wandb"),
        name=place.name,
        group=place.group,
        config=configuration,
        id=run_id,
        resume="allow",
        settings=wandb.Settings(**{name: value for name, value in WANDB_SETTINGS.items() if name in known}),
    )
    tracker.start()
    return tracker, run_id


def _start_trackio(place: Place, configuration: dict[str, Any]) -> tuple[Any, str]:
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        _project("trackio"),
        name=place.name,
        group=place.group,
        config=configuration,
        resume="never" if place.id is None else "must",
        embed=False,
    )
    tracker.start()
    if place.id not in (None, tracker.tracker.id):
        tracker.finish()
        raise EquipoiseError(
            f"a resumed run must continue its own run in trackio: the newest {place.name} there is another one"
        )
    return tracker, tracker.tracker.id


def _start_mlflow(place: Place, configuration: dict[str, Any]) -> tuple[Any, str]:
    for name, value in MLFLOW_LIMITS.items():
        os.environ.setdefault(name, value)
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(_project("mlflow"), run_name=place.name, run_id=place.id)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "mlflow.lock", timeout=120):  # two runs that begin at once would both make the experiment
        tracker.start()
    if place.id is None:  # MLflow refuses parameters that have changed
        try:
            tracker.store_init_configuration(configuration)
        except BaseException:
            finish("mlflow", tracker, is_complete=False)
            raise
    return tracker, tracker.tracker.info.run_id


def finish(name: str, tracker: Any, *, is_complete: bool) -> None:
    """Closes the run in the tracker, which shows a run that is not complete as stopped if it has a word for it."""
    with quiet():
        if name == "wandb" and not is_complete:
            tracker.tracker.finish(exit_code=1)
        elif name == "mlflow" and not is_complete:
            import mlflow

            mlflow.end_run("KILLED")
        elif name == "trackio":  # a run that it still knows would be closed again at exit, and it prints that
            import trackio

            trackio.finish()
        else:
            tracker.finish()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what a tracker prints: stdout is for results, and the live lines of a terminal are on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _prepare_accelerate() -> None:
    """Makes Accelerate's state as in a process on its own. A state that exists stays."""
    from accelerate.state import PartialState

    with mock.patch.dict(os.environ):
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        PartialState()
