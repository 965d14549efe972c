"""Runs of a comparison side by side: the numbers of a run alone, and no process that outlives its comparison."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cores import num_cores
from equipoise_lab.records import Run, read_json
from equipoise_lab.train import side_by_side
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare, _Run
from equipoise_lab.train.ranks import Ranks
from equipoise_lab.train.watch import Terminal

LOGS = ("steps", "loads", "evaluations")
THREADS = max(1, num_cores() // 2)


@pytest.fixture
def two(tiny, tmp_path):
    common = {field.name: getattr(tiny(steps=3), field.name) for field in dataclasses.fields(_Run)}
    common |= {"out": tmp_path / "out", "strategies": ("none", "lbl:scope=micro_batch"), "workers": 2}
    return lambda **options: Compare(**{**common, "save_model": False, **options})


@pytest.fixture
def processes(monkeypatch):
    """Those that are begun, in order."""
    begun, popen = [], subprocess.Popen

    def start(*args, **options):
        begun.append(popen(*args, **options))
        return begun[-1]

    monkeypatch.setattr(side_by_side.subprocess, "Popen", start)
    return begun


def _numbers(results):
    return [{key: value for key, value in result.items() if key != "tokens_per_second"} for result in results]


def _rows(config):
    return [
        [
            {key: value for key, value in row.items() if key != "seconds"}
            for log in LOGS
            for row in Run(run.out).rows(log)
        ]
        for run in config.runs()
    ]


def test_a_run_side_by_side_has_the_numbers_of_a_run_alone(two, silent, tmp_path, processes):
    beside, alone = two(), two(workers=1, out=tmp_path / "alone")
    found, failure = compare(beside, silent(), "equipoise compare ...")
    assert failure is None and len(processes) == 2
    torch.set_num_threads(THREADS)
    expected, _ = compare(alone, silent())
    assert len(processes) == 2, "one worker needs no process"
    assert _numbers(found) == _numbers(expected)
    assert _rows(beside) == _rows(alone)
    assert read_json(beside.out / "results.json") == found
    assert (beside.out / "report.html").exists()
    for run in beside.runs():
        config = Run(run.out).config
        assert (config["threads"], config["command"]) == (THREADS, "equipoise compare ...")
    assert "workers" not in read_json(beside.out / "compare.json")["options"]


def test_a_run_that_is_killed_or_fails_does_not_stop_those_beside_it(two, silent, processes):
    class Killer(silent):
        def step(self, row, tokens_per_second):
            processes[0].kill()

    strategies, watcher = ("none", "z:coefficient=1e38", "z"), Killer()
    results, killed = compare(two(strategies=strategies), watcher)
    assert [result["strategy"] for result in results] == ["z"]
    for words in (
        "that of none, seed 0, did not, its exit code is -9",
        "--resume",
        "--workers 1 needs less",
    ):
        assert words in str(killed)
    assert sum(str(killed) in line for line in watcher.said) == 1
    diverged = [line for line in watcher.said if "must not diverge: the loss of z:coefficient=1e38, seed 0" in line]
    assert len(diverged) == 1
    results, failure = compare(two(strategies=strategies, resume=True, workers=1), silent())
    assert [result["strategy"] for result in results] == ["none", "z"]
    assert type(failure) is EquipoiseError and diverged == [f"z:coefficient=1e38, seed 0: {failure}"]


def test_what_fails_before_anything_begins_is_one_error(two, silent, tmp_path, processes):
    watcher = silent()
    with pytest.raises(UsageError, match="nowhere does not exist"):
        compare(two(data=str(tmp_path / "nowhere"), strategies=("none", "z", "loss-free")), watcher)
    assert len(watcher.said) == 1
    assert all(process.returncode is not None for process in processes), "a process was left"


@pytest.mark.parametrize("how", ["SIGTERM to the parent", "Ctrl-C on a terminal", "SIGKILL to the parent"])
def test_a_comparison_that_is_stopped_leaves_no_process_and_goes_on(two, silent, tmp_path, how):
    options = {"steps": 100, "checkpoint_every": 10}
    config = two(**options)
    given = {**config.shared(), "out": config.out}
    given = {name: value for name, value in given.items() if value is not None and not isinstance(value, bool)}
    command = [sys.executable, "-m", "equipoise", "compare", "--workers=2", "--strategies", *config.strategies]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not all(_steps(run.out) >= 12 for run in config.runs()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        if how.startswith("SIG"):
            process.send_signal(getattr(signal, how.split()[0]))
        else:
            os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read().splitlines()  # to the end: the last process has closed it
    deadline = time.monotonic() + 60
    while _is_there(process.pid):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.02)
    assert not any("Traceback" in line or "Error" in line or "Exception" in line for line in said), said
    assert not all(Run(run.out).complete for run in config.runs()), "it was not stopped"  # one may have ended before
    if how == "SIGKILL to the parent":
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 130
    assert said[-1] == "equipoise: stopped. Go on with the same command and --resume."
    if how == "SIGTERM to the parent":
        watcher = silent()
        resumed, _ = compare(two(**options, resume=True), watcher)
        torch.set_num_threads(THREADS)
        whole = two(**options, workers=1, out=tmp_path / "whole")
        assert _numbers(resumed) == _numbers(compare(whole, silent())[0])
        assert _rows(config) == _rows(whole)
        assert watcher.done > 0


@pytest.mark.parametrize("alone", ["before it trains", "while it trains"])
def test_a_process_that_ends_is_not_told_to_stop_any_more(alone):
    program = """
        import atexit, os, signal, sys, time
        from multiprocessing import Pipe
        from equipoise_lab.train import side_by_side

        def train(run, watcher, command):
            ours.close()
            watcher.say("to nobody")

        def told_at_exit():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

        atexit.register(told_at_exit)
        side_by_side.train = train
        side_by_side._stop_when_alone = lambda pipe: None
        ours, theirs = Pipe()
        if sys.argv[1] == "before it trains":
            ours.close()
        else:
            ours.send((None, "", 1))
        side_by_side._main(theirs)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), alone]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")


def _steps(folder):
    return (folder / "steps.jsonl").read_bytes().count(b"\n") if (folder / "steps.jsonl").exists() else 0


def _is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_complete_runs_are_told_of_without_a_process(two, silent, processes):
    alone = two(workers=1)
    expected, _ = compare(alone, silent())
    found, _ = compare(two(resume=True), silent())
    assert found == expected
    assert processes == []


def test_the_number_of_workers_must_be_one_that_can_be(two, silent):
    with pytest.raises(UsageError, match="--workers must be at least 1: got 0"):
        compare(two(workers=0), silent())

    class TwoRanks(Ranks):
        def agree(self, values, say): ...

        def together(self, function, *args):
            return function(*args)

    with pytest.raises(UsageError, match="--workers must be 1 under torchrun, .*: got 2 on 2 ranks"):
        compare(two(), silent(), ranks=TwoRanks(size=2))
    assert not two().out.exists()


def test_by_default_there_is_a_worker_for_each_core_and_run_of_a_cpu(two, monkeypatch):
    from equipoise_lab.train import compare as module

    def workers(num_ranks=1, **options):
        return module._num_workers(two(**{"workers": None, **options}), Ranks(size=num_ranks))

    monkeypatch.setattr(module, "num_cores", lambda: 6)
    assert [workers(), workers(seeds=2), workers(seeds=5), workers(workers=9)] == [2, 4, 6, 9]
    assert workers(num_ranks=2) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workers() == 1


def test_the_terminal_has_a_line_for_each_run(tiny, capsys):
    row = {"step": 1, "loss": 1.0, "maxvio_batch": 3.0}
    with Terminal(num_runs=2) as terminal:
        first, second = terminal.another(), terminal.another()
        first.say("reading")
        first.begin(tiny(strategy="none"), 0)
        second.begin(tiny(strategy="z"), 3)
        first.step(row, 10.0)
        second.step({**row, "step": 4}, 20.0)
        first.step({**row, "step": 2}, 30.0)  # too soon for a line
        second.say("evaluating")
        first.end()
        assert [task.completed for task in terminal.progress.tasks] == [12, 3]
    assert capsys.readouterr().err.splitlines() == [
        "reading",
        "[2/2] z: going on after step 3",
        "[1/2] none  step 1/12  loss 1.000  maxvio 3.00  10 tokens/s  0 s left",
        "[2/2] z  step 4/12  loss 1.000  maxvio 3.00  20 tokens/s  0 s left",
        "[2/2] z: evaluating",
    ]
