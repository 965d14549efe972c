"""``report --live``: the page of runs that train."""

import os
import re
import shutil
import time

import pytest
from helpers.recorded_runs import make_audit, make_run, own_text

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.analysis import read_records
from equipoise_lab.cli.report import Report, run
from equipoise_lab.records import LOCK, Run, write_json
from equipoise_lab.report import live, write_live, write_report


@pytest.fixture
def pauses(monkeypatch):
    """A list of functions. Each takes the place of one pause between two pages."""
    actions = []
    monkeypatch.setattr(live.time, "sleep", lambda seconds: actions.pop(0)())
    return actions


def train_on(folder, to):
    """Steps without an evaluation."""
    run = Run(folder)
    for step in range(sum(1 for _ in run.rows("steps")) + 1, to + 1):
        run.append("steps", {"step": step, "loss": 1.0, "maxvio_batch": 0.5})
        run.append("loads", {"step": step, "load": [[1, 1, 1, 1], [2, 2, 2, 2]]})


def begin(folder, strategy="lbl", **options):
    """A run before its first step."""
    run = make_run(folder, strategy, last=1, finish=False, **options)
    for log in ("steps", "loads", "evaluations"):
        (run.path / f"{log}.jsonl").unlink()
    (run.path / LOCK).touch()


def test_the_page_follows_a_run_to_its_end(tmp_path, pauses):
    folder, said, pages, raw = tmp_path / "run", [], [], []

    def finish():
        pages.append(own_text(folder / "report.html"))
        raw.append((folder / "report.html").read_text())
        for log in ("steps", "loads"):
            (folder / f"{log}.jsonl").unlink()
        make_run(folder, "lbl")

    pauses += [lambda: begin(folder), lambda: train_on(folder, 3), finish]
    path = write_live(folder, 7, said.append)
    assert path == folder / "report.html" and not pauses
    assert said == [
        f"waiting for a first step in {folder}, which does not exist yet.",
        f"waiting for a first step in {folder}",
        f"open {path} in a browser; it loads itself again every 7 seconds",
    ]
    [page] = pages
    state = r"Live: written at \d\d:\d\d:\d\d, written again every 7 seconds\. lbl, seed 0: step 3 of 20\."
    assert re.search(state, page) and '<meta http-equiv="refresh" content="7">' in page
    assert "No run has an evaluation yet" in page
    assert 'class="still"' not in raw[0] and 'class="still"' in path.read_text()  # they would take the training's time
    last = own_text(path)
    assert "Live:" not in last and 'http-equiv="refresh"' not in last
    assert path.read_bytes() == write_report(folder).read_bytes()


def test_a_comparison_lives_until_all_its_runs_are_finished(tmp_path, pauses):
    write_json(tmp_path / "compare.json", {"options": {"strategies": ["none", "lbl"], "seeds": 1}})
    make_run(tmp_path / "a", "none")
    pages = []

    def second():
        pages.append(own_text(tmp_path / "report.html"))
        make_run(tmp_path / "b", "lbl")

    pauses.append(second)
    write_live(tmp_path, 5, lambda line: None)
    assert "1 of 2 runs finished." in pages[0] and "Live:" not in own_text(tmp_path / "report.html")


def test_an_interrupt_leaves_a_usual_page(tmp_path, pauses):
    begin(tmp_path / "a")
    train_on(tmp_path / "a", 2)

    def interrupt():
        raise KeyboardInterrupt

    pauses.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_live(tmp_path, 5, lambda line: None)
    assert "Live:" not in own_text(tmp_path / "report.html")


def test_a_run_that_gets_damaged_leaves_a_usual_page_of_what_was_there(tmp_path, pauses):
    begin(tmp_path / "a")
    train_on(tmp_path / "a", 2)
    pauses.append(lambda: (tmp_path / "a" / "config.json").write_text("{"))
    with pytest.raises(EquipoiseError, match="must contain a run or an audit that can be read"):
        write_live(tmp_path, 5, lambda line: None)
    page = own_text(tmp_path / "report.html")
    assert "lbl" in page and "Live:" not in page and 'http-equiv="refresh"' not in page


def test_an_interrupt_after_the_folder_has_gone_is_an_interrupt(tmp_path, pauses):
    begin(tmp_path / "runs" / "a")
    train_on(tmp_path / "runs" / "a", 2)

    def remove_and_interrupt():
        shutil.rmtree(tmp_path / "runs")
        raise KeyboardInterrupt

    pauses.append(remove_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_live(tmp_path / "runs", 5, lambda line: None)


def test_a_folder_that_goes_and_comes_back_is_said(tmp_path, pauses):
    folder, said = tmp_path / "run", []
    begin(folder)
    train_on(folder, 2)
    pauses += [lambda: shutil.rmtree(folder), lambda: make_run(folder, "lbl")]
    write_live(folder, 5, said.append)
    assert said[0].startswith("open ")
    assert said[1:] == [f"waiting for a first step in {folder}, which does not exist yet."]


def test_it_says_once_that_nothing_trains_and_goes_on_when_a_run_does(tmp_path, pauses):
    folder, said, pages = tmp_path / "run", [], []
    begin(folder)
    train_on(folder, 2)

    def look(then):
        pages.append("Nothing trains now" in own_text(folder / "report.html"))
        then()

    def finish():
        for log in ("steps", "loads"):
            (folder / f"{log}.jsonl").unlink()
        make_run(folder, "lbl")

    lock = folder / LOCK
    pauses += [lambda then=then: look(then) for then in (lock.unlink, lambda: None, lock.touch, finish)]
    write_live(folder, 5, said.append)
    assert pages == [False, True, True, False]
    assert said[0].startswith("open ") and [line[:18] for line in said[1:]] == ["Nothing trains now"]


def test_a_run_that_ends_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", "lbl", last=19, finish=False)
    rows = Run.rows

    def rows_then_end(self, log):
        yield from rows(self, log)
        if log == "steps":
            monkeypatch.setattr(Run, "rows", rows)
            for name in ("steps", "loads", "evaluations"):
                (run.path / f"{name}.jsonl").unlink()
            make_run(tmp_path / "a", "lbl")

    monkeypatch.setattr(Run, "rows", rows_then_end)
    records = read_records(tmp_path)
    assert [problem.kind for problem in records.problems] == ["unfinished"]
    assert [problem.kind for problem in read_records(tmp_path).problems] == []


def test_a_run_without_a_new_step_is_called_so(tmp_path, pauses):
    begin(tmp_path / "a")
    train_on(tmp_path / "a", 2)
    past = time.time() - 600
    os.utime(tmp_path / "a" / "steps.jsonl", (past, past))
    pages = []

    def finish():
        pages.append(own_text(tmp_path / "report.html"))
        for log in ("steps", "loads"):
            (tmp_path / "a" / f"{log}.jsonl").unlink()
        make_run(tmp_path / "a", "lbl")

    pauses.append(finish)
    write_live(tmp_path, 5, lambda line: None)
    assert "step 2 of 20, no new step for 10 min." in pages[0]


def test_an_audit_and_a_wrong_interval_are_refused(tmp_path):
    write_json(tmp_path / "audit.json", make_audit({"prose": [[1, 1, 1, 1]] * 2, "code": [[1, 1, 1, 1]] * 2}))
    with pytest.raises(EquipoiseError, match="--live needs runs: .* holds an audit"):
        write_live(tmp_path, 5, print)
    for every in (0, 10**20):
        with pytest.raises(UsageError, match=f"--every must be from 1 to 86,400 seconds: got {every}"):
            run(Report(tmp_path, live=True, every=every), "")
    with pytest.raises(UsageError, match="--every needs --live: got 5"):
        run(Report(tmp_path, every=5), "")
