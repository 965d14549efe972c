"""Trackers of a run: what they get and when, through a stand-in; and how each is begun, through stand-ins of packages.

Tests of the real packages are skipped where these are not installed.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from filelock import FileLock, Timeout

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.analysis.reader import read_runs
from equipoise_lab.records import Run, find_runs, is_new, read_json
from equipoise_lab.train import tracker_kinds, trackers
from equipoise_lab.train.config import Compare
from equipoise_lab.train.data import cache_folder
from equipoise_lab.train.loop import train
from equipoise_lab.train.tracker_kinds import Place, check_trackers
from equipoise_lab.train.trackers import layer_metrics


class Server:
    """Where the stand-ins of trackers log to: all starts, and by tracker all (step, values)."""

    def __init__(self):
        self.places, self.configurations, self.logged, self.finished = [], [], {}, []
        self.fails_at = {}  # by tracker, the step at which it fails; 0: its start

    def start(self, name, place, configuration, figures):
        if self.fails_at.get(name) == 0:
            raise ConnectionError("no server " + "and more " * 99 + "\nsecond line")
        self.places.append((name, place))
        self.configurations.append(configuration)
        self.logged.setdefault(name, [])
        tracker = SimpleNamespace(log=lambda values, step: self._log(name, values, step))
        tracker.tracker = SimpleNamespace(url="https://wandb.example/run", offline=False)
        return tracker, f"id of {name}"

    def _log(self, name, values, step):
        print("a tracker may print")
        if self.fails_at.get(name) == step:
            raise ConnectionError("the server is gone.")
        self.logged[name].append((step, values))

    def finish(self, name, tracker, *, is_complete):
        self.finished.append((name, is_complete))

    def steps(self, name, key):
        return [step for step, values in self.logged[name] if key in values]


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(trackers, "start", server.start)
    monkeypatch.setattr(trackers, "finish", server.finish)
    monkeypatch.setattr("equipoise_lab.train.loop.check_trackers", lambda config: None)
    return server


def test_a_tracker_gets_every_step_the_evaluations_and_the_result(tiny, server, capsys, new_watcher):
    config = tiny(tracker=("trackio",), evaluate_every=5, steps=12)
    result = train(config, new_watcher())
    rows = list(Run(config.out).rows("steps"))
    assert server.steps("trackio", "train/loss") == list(range(1, 13))
    assert server.steps("trackio", "selection/val_nats") == [5, 10, 12]
    assert server.steps("trackio", "result/val_nats") == [12]
    step, first = server.logged["trackio"][0]
    assert step == 1 and first["train/loss"] == rows[0]["loss"]
    assert first["equipoise/maxvio_batch"] == rows[0]["maxvio_batch"] and first["equipoise/alerts"] == 0
    assert first["train/tokens_per_second"] > 0
    assert server.logged["trackio"][-1][1]["result/maxvio_global"] == result["maxvio_global"]
    assert server.finished == [("trackio", True)]
    assert capsys.readouterr().out == ""


def test_what_never_changes_in_a_run_is_not_logged(tiny, server, new_watcher):
    config = tiny(tracker=("trackio",), steps=2)
    train(config, new_watcher())
    for names in ([name for _, values in server.logged["trackio"] for name in values], *Run(config.out).rows("steps")):
        assert not [name for name in names if "collective" in name]


def test_a_tracker_gets_the_options_and_the_facts(tiny, server, new_watcher):
    config = tiny(tracker=("trackio",), steps=2)
    train(config, new_watcher())
    (configuration,) = server.configurations
    assert configuration["strategy"] == config.strategy and configuration["seed"] == 0
    assert configuration["learning_rate"] == config.learning_rate and configuration["num_layers"] == 1
    assert configuration["num_parameters"] > 0
    assert all(isinstance(value, bool | int | float | str) for value in configuration.values())


def test_problems_are_counted(tiny, server, new_watcher):
    config = tiny(tracker=("trackio",), strategy="none", steps=30, experts=16, experts_per_token=1, learning_rate=0.1)
    train(config, new_watcher())
    counts = [values["equipoise/alerts"] for _, values in server.logged["trackio"] if "equipoise/alerts" in values]
    assert counts[0] == 0 and max(counts) >= 1


def test_layers_at_choice(tiny, server, new_watcher):
    config = tiny(tracker=("trackio",), tracker_layers=2, steps=2, layers=3)
    train(config, new_watcher())
    names = {name for name in server.logged["trackio"][0][1] if name.startswith("layers/")}
    assert names == {f"layers/{kind}/layer_{n}" for kind in ("maxvio_batch", "dead_experts") for n in (0, 2)}


def test_layers_of_a_deep_model():
    layers = [f"model.layers.{n}.mlp" for n in range(3, 61)]
    values = layer_metrics(layers, [[4, 0, 0, 0]] * len(layers), most=5)
    assert list(values)[:5] == [f"layers/maxvio_batch/layer_{n:02}" for n in (3, 17, 31, 46, 60)]
    assert values["layers/maxvio_batch/layer_03"] == 3 and values["layers/dead_experts/layer_60"] == 3


def test_names_of_layers_without_one_number_are_places():
    values = layer_metrics(["encoder.0.moe", "decoder.0.moe"], [[1, 1], [2, 0]], most=9)
    assert values["layers/maxvio_batch/layer_0"] == 0 and values["layers/maxvio_batch/layer_1"] == 1


def _stop(config, new_watcher, step):
    with pytest.raises(KeyboardInterrupt):
        train(config, new_watcher(stop_after=step))


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_resumed_run_continues_its_curves(tiny, server, name, new_watcher):
    """The watcher stops it after step 8; the newest checkpoint is of step 5. TensorBoard forgets, the others skip."""
    config = tiny(tracker=(name,), evaluate_every=4)
    _stop(config, new_watcher, 8)
    assert server.finished == [(name, False)]
    stopped = server.steps(name, "train/loss")
    assert stopped == list(range(1, 8))  # the watcher is told of a step before the trackers are
    train(replace(config, resume=True), new_watcher())
    place = server.places[1][1]
    assert place.id == f"id of {name}" and place.sent == (5 if name == "tensorboard" else 7)
    assert server.steps(name, "train/loss") == stopped + list(range(place.sent + 1, 13))
    assert server.steps(name, "selection/val_nats") == [4, 8, 12]


def test_after_a_kill_all_recorded_steps_count_as_sent(tiny, server, new_watcher):
    config = tiny(tracker=("trackio",))
    _stop(config, new_watcher, 8)
    path = config.out / trackers.FILE
    path.write_text(json.dumps({"trackio": {"id": "id of trackio", "sent": None}}))  # as while it runs
    train(replace(config, resume=True), new_watcher())
    assert server.places[1][1].sent == 8
    assert server.steps("trackio", "train/loss") == [*range(1, 8), *range(9, 13)]


def test_a_tracker_that_comes_later_gets_what_was_before(tiny, server, new_watcher):
    config = tiny(evaluate_every=4)
    _stop(config, new_watcher, 8)
    train(replace(config, resume=True, tracker=("mlflow",)), new_watcher())
    assert server.steps("mlflow", "train/loss") == list(range(1, 13))
    assert server.steps("mlflow", "selection/val_nats") == [4, 8, 12]
    steps = [step for step, _ in server.logged["mlflow"]]
    assert steps == sorted(steps)  # wandb drops what is older than its newest step


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(tiny, server, new_watcher):
    config, watcher = tiny(tracker=("mlflow", "trackio")), new_watcher()
    server.fails_at["mlflow"] = 4
    train(config, watcher)
    said = [text for text in watcher.said if "mlflow" in text and "failed" in text]
    assert len(said) == 1 and "at step 4" in said[0] and "ConnectionError: the server is gone." in said[0]
    assert server.steps("mlflow", "train/loss") == [1, 2, 3]
    assert server.steps("trackio", "train/loss") == list(range(1, 13))
    assert server.finished == [("mlflow", False), ("trackio", True)], "an open run would get the next one's metrics"
    assert Run(config.out).complete
    assert read_json(config.out / trackers.FILE)["mlflow"]["sent"] == {"steps": 3, "evaluations": 0}


def test_a_complete_run_says_that_it_sends_nothing_more(tiny, server, new_watcher):
    config, watcher = tiny(tracker=("mlflow",), steps=4), new_watcher()
    server.fails_at["mlflow"] = 3
    train(config, new_watcher())
    train(replace(config, resume=True), watcher)
    assert watcher.said == [f"mlflow lacks steps of {config.out}, which is complete: nothing more is sent"]
    train(replace(config, resume=True, tracker=("none",)), watcher)
    assert len(watcher.said) == 1


def test_a_tracker_that_was_left_out_after_a_kill_gets_the_steps_since(tiny, server, new_watcher):
    config = tiny(tracker=("trackio",))
    _stop(config, new_watcher, 4)
    (config.out / trackers.FILE).write_text(json.dumps({"trackio": {"id": "id of trackio", "sent": None}}))
    _stop(replace(config, resume=True, tracker=("none",)), new_watcher, 8)
    train(replace(config, resume=True), new_watcher())
    assert server.places[1][1].sent == 4
    assert server.steps("trackio", "train/loss") == [1, 2, 3, *range(5, 13)]


def test_what_a_failed_tracker_lacks_is_sent_after_a_stop(tiny, server, new_watcher):
    config = tiny(tracker=("mlflow",))
    server.fails_at["mlflow"] = 4
    _stop(config, new_watcher, 8)
    server.fails_at = {}
    train(replace(config, resume=True), new_watcher())
    assert server.steps("mlflow", "train/loss") == list(range(1, 13))


def test_a_tracker_that_does_not_start_is_named_once_and_the_run_goes_on(tiny, server, new_watcher):
    config, watcher = tiny(tracker=("wandb",)), new_watcher()
    server.fails_at["wandb"] = 0
    train(config, watcher)
    said = [text for text in watcher.said if text.startswith("wandb failed")]
    assert len(said) == 1 and "at its start" in said[0] and "no server" in said[0] and len(said[0]) < 600
    assert Run(config.out).complete


def test_wandb_names_the_page_of_the_run(tiny, server, new_watcher):
    config, watcher = tiny(tracker=("wandb",), steps=2), new_watcher()
    train(config, watcher)
    assert watcher.said.count("wandb: https://wandb.example/run") == 1


def test_trackers_do_not_change_the_numbers_nor_the_name_of_a_run(tiny, server, tmp_path, new_watcher):
    config = tiny(steps=4)
    tracked = replace(config, out=tmp_path / "tracked", tracker=("wandb", "tensorboard"), tracker_layers=1)
    assert tracked.shared() == config.shared()
    plain, other = train(config, new_watcher()), train(tracked, new_watcher())
    assert {**plain, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}


def test_a_folder_without_a_step_is_new_whatever_trackers_do(tiny, server, new_watcher):
    """A run that fails before its first step has not begun in its trackers either."""
    config = tiny(tracker=("trackio",))
    watcher = new_watcher()
    watcher.begin = lambda config, done: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config, watcher)
    assert server.places == [] and is_new(config.out)
    _stop(config, new_watcher, 3)
    assert not is_new(config.out)


def test_files_of_trackers_are_no_runs(tiny, server, new_watcher):
    config = tiny(tracker=("trackio",), steps=2)
    train(config, new_watcher())
    (config.out / "events.out.tfevents.1.host.1.0").write_bytes(b"")
    for name in ("mlruns", "wandb"):
        (config.out.parent / name / "0").mkdir(parents=True)
    assert [run.path for run in find_runs(config.out.parent)] == [config.out]
    assert read_runs(config.out.parent)[1] == []


def test_without_a_tracker_there_is_no_file_of_trackers(tiny, new_watcher):
    config = tiny(steps=2)
    train(config, new_watcher())
    assert not (config.out / trackers.FILE).exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"trackio": {"id": 7, "sent": null}}', '{"trackio": {"id": "a"}}'])
def test_a_damaged_file_of_trackers_is_named(tiny, server, new_watcher, content):
    config = tiny(tracker=("trackio",))
    _stop(config, new_watcher, 3)
    (config.out / trackers.FILE).write_text(content)
    with pytest.raises(EquipoiseError, match="trackers.json"):
        train(replace(config, resume=True), new_watcher())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tracker": ("none", "wandb")}, "none wandb"),
        ({"tracker": ("wandb", "wandb")}, "wandb wandb"),
        ({"tracker": ()}, "no name"),
        ({"tracker": ("aim",)}, "'aim'"),
        ({"tracker_layers": 2}, "--tracker-layers needs --tracker"),
        ({"tracker": ("wandb",), "tracker_layers": -1}, "--tracker-layers must be at least 0"),
    ],
)
def test_wrong_options(tiny, options, words):
    with pytest.raises(UsageError, match=words):
        tiny(**options).check()


def test_none_is_no_tracker(tiny):
    assert tiny().trackers == () and tiny(tracker=("wandb",)).trackers == ("wandb",)
    assert {run.trackers for run in Compare(out=Path("x"), tracker=("wandb", "mlflow")).runs()} == {("wandb", "mlflow")}


# ---- how each begins ----


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named_before_any_text_is_read(tiny, monkeypatch, name, new_watcher):
    monkeypatch.setattr(tracker_kinds, "find_spec", lambda module: None if module == name else object())
    config = tiny(tracker=(name,), data="/nowhere")
    with pytest.raises(EquipoiseError, match=f"--tracker {name} needs .* pip install {name}"):
        check_trackers(config)
    monkeypatch.setattr("equipoise_lab.train.loop.load_text", lambda *args: pytest.fail("the text was read"))
    with pytest.raises(EquipoiseError, match=f"pip install {name}"):
        train(tiny(tracker=(name,)), new_watcher())
    assert is_new(config.out)


def test_accelerate_is_named_if_it_is_missing(tiny, monkeypatch):
    monkeypatch.setattr(tracker_kinds, "find_spec", lambda module: None if module == "accelerate" else object())
    with pytest.raises(EquipoiseError, match="accelerate is not installed"):
        check_trackers(tiny(tracker=("trackio",)))


@pytest.fixture
def package(monkeypatch):
    """Puts a stand-in in place of a package."""

    def package(name, **contents):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return package


class _Settings(SimpleNamespace):
    model_fields = ("silent", "console")  # an older version: no finish_timeout


def _wandb(package, mode="online", is_logged_in=True):
    calls = {}

    def login(**options):
        calls["login"] = options
        return is_logged_in

    def init(**options):
        calls["init"] = options
        return SimpleNamespace(log=lambda values, step: None, finish=lambda **options: calls.update(finish=options))

    setup = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    package("wandb", login=login, init=init, setup=lambda: setup, Settings=_Settings)
    return calls


@pytest.mark.parametrize(
    ("mode", "is_logged_in", "passes"), [("online", True, 1), ("online", False, 0), ("offline", False, 1)]
)
def test_wandb_never_asks_for_a_login(tiny, package, mode, is_logged_in, passes):
    calls = _wandb(package, mode, is_logged_in)
    if passes:
        check_trackers(tiny(tracker=("wandb",)))
    else:
        with pytest.raises(EquipoiseError, match="`wandb login` once, or set WANDB_MODE=offline"):
            check_trackers(tiny(tracker=("wandb",)))
    assert calls.get("login", {"prompt": False})["prompt"] is False


def test_wandb_continues_the_run_with_its_id(package, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    calls = _wandb(package)
    (tmp_path / "compare.json").write_text("{}")
    folder = tmp_path / "none_seed0"
    _, first = tracker_kinds.start("wandb", Place(folder, None, 0), {"seed": 0}, [])
    assert calls["init"]["name"] == f"{tmp_path.name}/none_seed0" and calls["init"]["group"] == tmp_path.name
    assert calls["init"]["project"] == "equipoise" and calls["init"]["config"] == {"seed": 0}
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tracker, second = tracker_kinds.start("wandb", Place(folder, first, 7), {"seed": 0}, [])
    assert second == first == calls["init"]["id"] and calls["init"]["resume"] == "allow"
    assert calls["init"]["project"] == "mine"
    tracker_kinds.finish("wandb", tracker, is_complete=False)
    assert calls["finish"] == {"exit_code": 1}


def test_trackio_continues_its_own_run_only(package, tmp_path):
    calls, runs = [], iter(["a", "a", "b"])

    def init(**options):
        calls.append(options)
        print("* Trackio project initialized")
        return SimpleNamespace(id=next(runs), log=lambda values, step: None, finish=lambda: None)

    package("trackio", init=init, finish=lambda: None)
    folder = tmp_path / "one"
    assert tracker_kinds.start("trackio", Place(folder, None, 0), {"seed": 0}, [])[1] == "a"
    assert tracker_kinds.start("trackio", Place(folder, "a", 7), {"seed": 0}, [])[1] == "a"
    assert [call["resume"] for call in calls] == ["never", "must"] and calls[0]["name"] == "one"
    with pytest.raises(EquipoiseError, match="must continue its own run"):
        tracker_kinds.start("trackio", Place(folder, "a", 7), {"seed": 0}, [])


def test_mlflow_continues_its_run_and_waits_only_shortly(package, tmp_path, monkeypatch):
    for name in ("MLFLOW_EXPERIMENT_NAME", *tracker_kinds.MLFLOW_LIMITS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    started, params, ended, locked = [], [], [], []

    def search_experiments(filter_string):
        try:
            with FileLock(cache_folder() / "mlflow.lock", timeout=0):
                locked.append(False)
        except Timeout:
            locked.append(True)
        return [SimpleNamespace(experiment_id="7")]

    def start_run(**options):
        started.append(options)
        return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

    module = package(
        "mlflow",
        search_experiments=search_experiments,
        start_run=start_run,
        log_params=params.append,
        end_run=lambda *status: ended.append(status),
    )
    module.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
    tracker, first = tracker_kinds.start("mlflow", Place(tmp_path / "one", None, 0), {"seed": 0}, [])
    tracker_kinds.finish("mlflow", tracker, is_complete=False)
    tracker, _ = tracker_kinds.start("mlflow", Place(tmp_path / "one", first, 7), {"seed": 0}, [])
    tracker_kinds.finish("mlflow", tracker, is_complete=True)
    assert [one["run_id"] for one in started] == [None, "m1"] and started[0]["run_name"] == "one"
    assert params == [{"seed": 0}]  # MLflow refuses parameters that have changed
    assert ended == [("KILLED",), ()]
    assert locked == [True, True]  # two runs that begin at once would both make the experiment
    assert (os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) == ("1", "33")


STARTED = """
import sys, types
from importlib.machinery import ModuleSpec
from pathlib import Path
run = types.SimpleNamespace(id="run", log=lambda values, step: None)
sys.modules["trackio"] = types.ModuleType("trackio")
vars(sys.modules["trackio"]).update(init=lambda **options: run, __spec__=ModuleSpec("trackio", None))
from equipoise_lab.train import tracker_kinds
tracker, _ = tracker_kinds.start("trackio", tracker_kinds.Place(Path("one"), None, 0), {}, [])
tracker.log({"train/loss": 1.0}, step=1)
import torch.distributed as dist
from accelerate.state import PartialState
print(dist.is_initialized(), PartialState().num_processes)
"""


@pytest.mark.slow
def test_accelerate_joins_no_ranks(tmp_path):
    """Under torchrun with one process the lab makes no process group, and a tracker must not make one either."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    printed = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=tmp_path, env={**os.environ, **ranks}, capture_output=True, text=True
    )
    assert printed.stdout.split() == ["False", "1"], printed.stderr


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_itself_shows_each_step_once(tiny, monkeypatch, new_watcher):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(tracker=("tensorboard",), evaluate_every=4)
    _stop(config, new_watcher, 8)
    train(replace(config, resume=True), new_watcher())
    events = EventAccumulator(str(config.out)).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == list(range(1, 13))
    assert [point.step for point in events.Scalars("selection/val_nats")] == [4, 8, 12]
    assert not [path for path in config.out.iterdir() if path.is_dir() and path.name not in ("model", "checkpoints")]


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_the_tracker_itself_takes_a_run_and_its_continuation(tiny, monkeypatch, tmp_path, capsys, name, new_watcher):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config, watcher = tiny(tracker=(name,)), new_watcher()
    _stop(config, new_watcher, 8)
    train(replace(config, resume=True), watcher)
    assert not [text for text in watcher.said if "failed" in text or "may lack" in text]
    assert read_json(config.out / trackers.FILE)[name]["sent"] == {"steps": 12, "evaluations": 12}
    assert capsys.readouterr().out == ""
