"""The live lines of a run and of a comparison, drawn for terminals of several widths, and the lines in a file."""

import io
import re

import pytest
from rich.console import Console

from equipoise_lab.train import watch
from equipoise_lab.train.tracker_kinds import quiet
from equipoise_lab.train.watch import Terminal

WIDTHS = (60, 80, 100, 160)
LONG = "loss-free:rate=1e-3+lbl:scope=sequence,coefficient=1e-4"
ROW = {"step": 1, "loss": 5.12345, "maxvio_batch": 1.234}
ALERTS = {"holding": "3 dead experts, collapse of 2 layers"}


@pytest.fixture
def clock(monkeypatch):
    """The seconds that time.monotonic() returns, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(params=WIDTHS)
def screen(request):
    return Console(file=io.StringIO(), width=request.param, force_terminal=True, color_system=None)


def _lines(screen, terminal):
    with screen.capture() as shown:
        screen.print(terminal.progress)
    lines = shown.get().splitlines()
    assert all(len(line) <= screen.width - 3 for line in lines), "no room for ^C"
    return [line.rstrip() for line in lines]


def test_step_time_left_and_loss_come_first_at_every_width_and_the_label_is_cut(tiny, screen, clock):
    terminal = Terminal(console=screen)
    terminal.begin(tiny(strategy=LONG, steps=800), 0)
    assert _lines(screen, terminal)[0].startswith("  0/800 -:--:-- left first step ... loss-free:r")
    clock[0] += 10
    terminal.step(ROW | ALERTS, 123456.7)
    (line,) = _lines(screen, terminal)
    assert line.startswith("  1/800 2:13:10 left loss 5.123 loss-free:r"), line
    assert (LONG in line) == (screen.width == 160) or "…" in line
    assert ("maxvio 1.23" in line) == (screen.width >= 80), line
    assert ("123,457 tokens/s" in line) == (screen.width >= 100), line
    assert "!" in line and ("! 3 dead" in line) == (screen.width >= 100), line
    clock[0] += 3
    assert _lines(screen, terminal)[0].startswith("  1/800 2:13:07 left"), "the time left does not run between steps"


def test_what_is_said_while_a_tracker_works_is_seen(capsys):
    terminal = Terminal()
    with quiet():
        terminal.say("stopping after this step")
    assert capsys.readouterr() == ("", "stopping after this step\n")


def test_a_short_label_is_never_cut(tiny, screen):
    terminal = Terminal(console=screen)
    terminal.begin(tiny(strategy="lbl:scope=global_batch"[:3], steps=800, seed=3), 0)
    terminal.step(ROW, 123456.7)
    assert " lbl seed 3" in _lines(screen, terminal)[0]


def test_a_comparison_has_one_time_left_for_all_its_runs(tiny, screen, clock):
    terminal = Terminal(num_runs=4, console=screen)
    watchers = [terminal.add_run() for _ in range(4)]
    for watcher, strategy in zip(watchers[:2], (LONG, "none"), strict=True):
        watcher.begin(tiny(strategy=strategy, steps=10), 0)
    clock[0] += 6
    watchers[0].step(ROW, 1.0)
    watchers[1].step(ROW, 1.0)
    total, first, second = _lines(screen, terminal)
    assert total == "0/4 runs 0:01:54 left"  # 3 s a step, and 38 steps are left
    assert re.match(r" 1/10 +loss 5\.123 \[1/4\] loss-free:r", first), first
    assert re.match(r" 1/10 +loss 5\.123 \[2/4\] none", second), second
    for step in range(2, 11):
        watchers[1].step(ROW | {"step": step}, 1.0)
    watchers[1].end()
    total, first = _lines(screen, terminal)
    assert total.startswith("1/4 runs") and "[1/4]" in first, "a run that is over has a line still"
    assert re.search(r"10/10  loss 5\.123  maxvio 1\.23  1 tokens/s  \[2/4\] none", screen.file.getvalue())


def test_the_time_left_leaves_out_steps_of_before_and_of_failed_runs(tiny, clock):
    terminal = Terminal(num_runs=3, console=Console(file=io.StringIO(), width=80, force_terminal=True))
    with terminal:
        terminal.begin(tiny(steps=10), 5)  # resumed
        clock[0] += 4
        terminal.step(ROW | {"step": 6}, 1.0)
        assert terminal.clock.seconds_left() == 4 * 24
        terminal.end()  # it failed: its 4 further steps are never trained
        assert terminal.clock.seconds_left() == 4 * 20
        terminal.begin(tiny(steps=10), 10)  # complete since before
        terminal.end()
        assert terminal.clock.seconds_left() == 4 * 10
        assert terminal.progress.tasks[0].fields["count"] == "2/3 runs"


def test_a_line_of_a_file_has_the_whole_label_and_the_time_left(tiny, capsys, clock):
    terminal = Terminal()
    with terminal:
        terminal.begin(tiny(strategy=LONG, steps=800), 0)
        clock[0] += 10
        terminal.step(ROW | ALERTS, 123456.7)
    figures = "loss 5.123  maxvio 1.23  123,457 tokens/s  ! 3 dead experts, collapse of 2 layers"
    assert capsys.readouterr().err == f"{LONG}  step 1/800  2.2 h left  {figures}\n"
