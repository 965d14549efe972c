"""Parallel runs of a comparison: they give the numbers of single runs, and no process outlives its comparison."""

import dataclasses
import os
import re
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
from equipoise_lab.train.checkpoint import newest_step
from equipoise_lab.train.compare import compare
from equipoise_lab.train.config import Compare, _Run
from equipoise_lab.train.ranks import Ranks
from equipoise_lab.train.watch import Terminal

LOGS = ("steps", "loads", "evaluations")
THREADS = max(1, num_cores() // 2)


@pytest.fixture
def make_comparison(tiny, tmp_path):
    common = {field.name: getattr(tiny(steps=3), field.name) for field in dataclasses.fields(_Run)}
    common |= {"out": tmp_path / "out", "strategies": ("none", "lbl:scope=micro_batch"), "workers": 2}
    return lambda **options: Compare(**{**common, "save_model": False, **options})


@pytest.fixture
def processes(monkeypatch):
    """The started processes, in order."""
    started, popen = [], subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(side_by_side.subprocess, "Popen", start)
    return started


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


def test_a_parallel_run_gives_the_numbers_of_a_single_run(make_comparison, new_watcher, tmp_path, processes):
    parallel, single = make_comparison(), make_comparison(workers=1, out=tmp_path / "single")
    results, failure = compare(parallel, new_watcher(), "equipoise compare ...")
    assert failure is None and len(processes) == 2
    torch.set_num_threads(THREADS)
    expected, _ = compare(single, new_watcher())
    assert len(processes) == 2, "one worker needs no process"
    assert _numbers(results) == _numbers(expected)
    assert _rows(parallel) == _rows(single)
    assert read_json(parallel.out / "results.json") == results
    assert (parallel.out / "report.html").exists()
    for run in parallel.runs():
        config = Run(run.out).config
        assert (config["threads"], config["command"]) == (THREADS, "equipoise compare ...")
    assert "workers" not in read_json(parallel.out / "compare.json")["options"]


def test_a_killed_or_failed_run_does_not_stop_parallel_runs(make_comparison, new_watcher, processes):
    class Killer(new_watcher):
        def step(self, row, tokens_per_second):
            processes[0].kill()

    strategies, watcher = ("none", "z:coefficient=1e38", "z"), Killer()
    results, killed = compare(make_comparison(strategies=strategies), watcher)
    assert [result["strategy"] for result in results] == ["z"]
    for part in (
        "the process of none, seed 0, died with exit code -9",
        "--resume",
        "--workers 1 needs less",
    ):
        assert part in str(killed)
    assert sum(str(killed) in line for line in watcher.said) == 1
    diverged = [line for line in watcher.said if "must not diverge: the loss of z:coefficient=1e38, seed 0" in line]
    assert len(diverged) == 1
    results, failure = compare(make_comparison(strategies=strategies, resume=True, workers=1), new_watcher())
    assert [result["strategy"] for result in results] == ["none", "z"]
    assert type(failure) is EquipoiseError and diverged == [f"z:coefficient=1e38, seed 0: {failure}"]


def test_a_failure_before_the_first_run_is_reported_once(make_comparison, new_watcher, tmp_path, processes):
    watcher = new_watcher()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = make_comparison(model=tmp_path / "model", strategies=("none", "z", "loss-free"))
    with pytest.raises(EquipoiseError, match="model_type") as caught:
        compare(config, watcher)
    assert len([line for line in watcher.said if str(caught.value) in line]) == 1
    assert not config.out.exists()
    assert all(process.returncode is not None for process in processes), "a process remains"


@pytest.mark.parametrize("how", ["SIGTERM to the parent", "Ctrl-C on a terminal", "SIGKILL to the parent"])
def test_a_stopped_comparison_leaves_no_process_and_can_be_resumed(make_comparison, new_watcher, tmp_path, how):
    options = {"steps": 100, "checkpoint_every": 10}
    config = make_comparison(**options)
    arguments = {**config.shared(), "out": config.out}
    arguments = {name: value for name, value in arguments.items() if value is not None and not isinstance(value, bool)}
    command = [sys.executable, "-m", "equipoise", "compare", "--workers=2", "--strategies", *config.strategies]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not all(_steps(run.out) >= 12 for run in config.runs()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        if how.startswith("SIG"):
            process.send_signal(getattr(signal, how.split()[0]))
        else:
            os.killpg(process.pid, signal.SIGINT)
        lines = process.stderr.read().splitlines()  # ends when the last process has closed stderr
    deadline = time.monotonic() + 60
    while _process_group_exists(process.pid):
        assert time.monotonic() < deadline, "a process remains"
        time.sleep(0.02)
    text = "\n".join(lines)
    assert not any(word in text for word in ("Traceback", "Error", "Exception")), lines
    # One run may have ended before the stop.
    assert not all(Run(run.out).complete for run in config.runs()), "the comparison was not stopped"
    if how == "SIGKILL to the parent":
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 130
    assert re.fullmatch(
        r"equipoise: stopped\. [01] of 2 runs are complete\. To continue with (step \d+|the evaluation) of \S+"
        r"(, (step \d+|the evaluation) of \S+)?, run the same command with --resume\.",
        lines[-1],
    ), lines[-1]
    assert any("stopping every run after its step, with a checkpoint" in line for line in lines), lines
    for run in config.runs():
        if not Run(run.out).complete:
            saved = newest_step(run.out / "checkpoints")
            assert saved == _steps(run.out), "steps were lost"
            place = "the evaluation" if saved == run.steps else f"step {saved + 1}"
            assert f"{place} of {run.label}" in lines[-1]
    if how == "SIGTERM to the parent":
        watcher = new_watcher()
        resumed, _ = compare(make_comparison(**options, resume=True), watcher)
        torch.set_num_threads(THREADS)
        whole = make_comparison(**options, workers=1, out=tmp_path / "whole")
        assert _numbers(resumed) == _numbers(compare(whole, new_watcher())[0])
        assert _rows(config) == _rows(whole)
        assert watcher.done > 0


@pytest.mark.parametrize("parent_ends", ["before it trains", "while it trains"])
def test_a_process_that_is_ending_ignores_sigterm(parent_ends):
    program = """
        import atexit, os, signal, sys, time
        from multiprocessing import Pipe
        from equipoise_lab.train import side_by_side

        def train(run, watcher, command, says_text):
            parent_pipe.close()
            watcher.say("the parent is gone")

        def sigterm_at_exit():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

        atexit.register(sigterm_at_exit)
        side_by_side.train = train
        side_by_side._stop_without_parent = lambda pipe: None
        parent_pipe, child_pipe = Pipe()
        if sys.argv[1] == "before it trains":
            parent_pipe.close()
        else:
            parent_pipe.send((None, "", 1))
        side_by_side._main(child_pipe)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), parent_ends]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")


def _steps(folder):
    return (folder / "steps.jsonl").read_bytes().count(b"\n") if (folder / "steps.jsonl").exists() else 0


def _process_group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_complete_runs_are_reported_without_a_process(make_comparison, new_watcher, processes):
    expected, _ = compare(make_comparison(workers=1), new_watcher())
    results, _ = compare(make_comparison(resume=True), new_watcher())
    assert results == expected
    assert processes == []


def test_an_invalid_number_of_workers_is_refused(make_comparison, new_watcher):
    with pytest.raises(UsageError, match="--workers must be at least 1: got 0"):
        compare(make_comparison(workers=0), new_watcher())

    class TwoRanks(Ranks):
        def check_equal(self, values, message): ...

        def run_on_all(self, function, *args):
            return function(*args)

    with pytest.raises(UsageError, match="--workers must be 1 under torchrun, .*: got 2 on 2 ranks"):
        compare(make_comparison(), new_watcher(), ranks=TwoRanks(size=2))
    assert not make_comparison().out.exists()


def test_the_default_is_one_worker_per_core_and_run_on_a_cpu(make_comparison, monkeypatch):
    from equipoise_lab.train import compare as module

    def workers(num_ranks=1, **options):
        return module._num_workers(make_comparison(**{"workers": None, **options}), Ranks(size=num_ranks))

    monkeypatch.setattr(module, "num_cores", lambda: 6)
    assert [workers(), workers(seeds=2), workers(seeds=5), workers(seeds=5, workers=9)] == [2, 4, 6, 9]
    assert workers(workers=9) == 2, "more would share out cores that no run uses"
    assert workers(num_ranks=2) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workers() == 1


def test_the_terminal_has_a_line_for_each_run(tiny, capsys):
    row = {"step": 1, "loss": 1.0, "maxvio_batch": 3.0}
    with Terminal(num_runs=2) as terminal:
        first, second = terminal.add_run(), terminal.add_run()
        first.say("reading")
        first.begin(tiny(strategy="none"), 0)
        second.begin(tiny(strategy="z"), 3)
        first.step(row, 10.0)
        second.step({**row, "step": 4}, 20.0)
        first.step({**row, "step": 2}, 30.0)  # too soon for another line
        second.say("evaluating")
        first.end()
        assert [task.completed for task in terminal.progress.tasks] == [1, 12, 4]  # runs, and steps of each
    assert capsys.readouterr().err.splitlines() == [
        "reading",
        "[2/2] z: continuing after step 3",
        "[1/2] none  step 1/12  0 s left for all runs  loss 1.000  maxvio 3.00  10 tokens/s",
        "[2/2] z  step 4/12  0 s left for all runs  loss 1.000  maxvio 3.00  20 tokens/s",
        "[2/2] z: evaluating",
    ]
