"""`make gpu` without a GPU: its parts on small sizes, its result and its page, and what becomes of a broken part."""

import json
import sys
from pathlib import Path

import gpu
import gpu_costs
import gpu_exactness
import gpu_graphs
import gpu_page
import pytest
import torch
from gpu_parts import FAILED, NOT_RUN, OK, Part, Setting, make_row, status_of

from equipoise import LoadBalancingLoss, kernels
from equipoise.counting import layout

ROOT = Path(__file__).parents[2]
SETTING = Setting(torch.device("cpu"), small=True)
ON_A_GPU_ONLY = {"waits", "graphs", "tests"}

pytestmark = [pytest.mark.xdist_group("gpu"), pytest.mark.filterwarnings("ignore::UserWarning")]


def _part(name, rows, seconds=30):
    return Part(name, name.title(), "something", seconds, rows)


def _good(setting):
    yield make_row("a row", lambda: {"figure": 1})


def _raises(setting):
    yield make_row("first", dict)
    raise RuntimeError("broken on purpose")


def test_all_parts_run_on_a_cpu_and_give_a_result_and_a_page(tmp_path):
    written = []
    result = gpu.run_all(SETTING, lambda r: written.append(json.dumps(r)), run=gpu.run_in_process)
    assert json.loads(written[-1]) == json.loads(json.dumps(result))
    assert len(written) == 1 + len(gpu.PARTS), "the result must be written before the first part and after each"
    assert [part["name"] for part in result["parts"]] == [part.name for part in gpu.PARTS]
    for part in result["parts"]:
        expected = (NOT_RUN, "needs a GPU") if part["name"] in ON_A_GPU_ONLY else (OK, "")
        assert (part["status"], part["message"]) == expected, part
        assert part["rows"]
    page = gpu_page.page(gpu.PARTS, result)
    assert "**Nothing on this page has been seen on a GPU:** this is a run on a CPU. 6 of 9 parts are ok." in page
    assert "Not run, so not seen: Waiting, CUDA graphs, Tests." in page
    assert all(f"## {part.title}" in page for part in gpu.PARTS)
    strategies = next(part for part in result["parts"] if part["name"] == "strategies")
    shown = {row["what"] for row in strategies["rows"]}
    assert all(f"{s}, {f}, masked" in shown for s in gpu_exactness.STRATEGIES for f in gpu_exactness.SCORE_FUNCTIONS)


def test_a_part_that_fails_loses_no_other():
    parts = [_part("one", _good), _part("two", _raises), _part("three", _good)]
    written = []
    result = gpu.run_all(SETTING, lambda r: written.append(json.dumps(r)), parts, gpu.run_in_process)
    assert [part["status"] for part in result["parts"]] == [OK, FAILED, OK]
    broken = result["parts"][1]
    assert "RuntimeError: broken on purpose" in broken["message"] and broken["rows"] == [
        {"what": "first", "status": OK}
    ]
    cut = json.loads(written[2])["parts"]  # as if the run had ended after the second part
    assert [part["status"] for part in cut] == [OK, FAILED, NOT_RUN] and cut[2]["message"] == "the run ended before it"
    page = gpu_page.page(parts, result)
    assert "Failed: Two." in page and "broken on purpose" in page


def test_a_row_that_fails_fails_its_part_and_says_where():
    def rows(setting):
        yield make_row("right", dict)
        yield make_row("wrong", lambda: gpu_exactness.check_at_most("an error", 2, 1))
        yield make_row("not here", lambda: gpu_graphs.require_gpu(setting))

    (part,) = gpu.run_all(SETTING, lambda r: None, [_part("one", rows)], gpu.run_in_process)["parts"]
    assert [row["status"] for row in part["rows"]] == [OK, FAILED, NOT_RUN]
    assert part["status"] == FAILED
    assert "1 of 3 rows failed. First, wrong: AssertionError: an error must be at most 1: got 2" in part["message"]
    assert "benchmarks/gpu_exactness.py, line" in part["message"]


def test_no_part_begins_when_no_time_is_left():
    result = gpu.run_all(SETTING, lambda r: None, [_part("one", _good)], gpu.run_in_process, limit=0.5)
    assert result["parts"][0]["status"] == NOT_RUN and "no time was left" in result["parts"][0]["message"]


def test_a_part_in_a_process_is_stopped_at_its_limit_and_keeps_its_rows(monkeypatch):
    row = {"what": "a row", "status": OK}
    code = f"import sys, time; f = open(sys.argv[1], 'a'); f.write({json.dumps(row) + chr(10)!r}); f.write('{{\"wh'); "

    def command(end):
        return lambda part, setting, rows: [sys.executable, "-c", f"{code}f.flush(); {end}", str(rows)]

    part = _part("one", _good)
    monkeypatch.setattr(gpu, "part_command", command("time.sleep(600)"))
    assert gpu.run_isolated(part, SETTING, 3) == ([row], "it took longer than its limit of 3 s")
    monkeypatch.setattr(gpu, "part_command", command("sys.exit('no memory')"))
    assert gpu.run_isolated(part, SETTING, 60) == ([row], "its process ended with code 1: no memory")
    monkeypatch.setattr(gpu, "part_command", command("import os; os.abort()"))
    assert gpu.run_isolated(part, SETTING, 60)[1].startswith("its process ended with code -6")


def test_a_part_in_a_process_gives_its_rows():
    (part,) = (part for part in gpu.PARTS if part.name == "graphs")
    rows, error = gpu.run_isolated(part, SETTING, 120)
    assert error == "" and status_of(rows) == (NOT_RUN, "needs a GPU") and len(rows) == 3


def test_without_a_gpu_it_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert "must run on a machine with a CUDA device" in ended.value.code and "\n" not in ended.value.code
    assert capsys.readouterr() == ("", "")


def _count_twice_the_last_token(monkeypatch):
    original, of_sequences = layout.Layout.count, kernels.count_by_sequence

    def count(self, vector, layer, expert_ids, mask):
        original(self, vector, layer, expert_ids, mask)
        self.load(vector, layer)[expert_ids[-1, 0]] += 1

    def count_by_sequence(expert_ids, sequence_ids, counts, num_sequences, num_experts, load=None):
        if load is not None:
            load[expert_ids[-1, 0]] += 1
        return of_sequences(expert_ids, sequence_ids, counts, num_sequences, num_experts, load)

    monkeypatch.setattr(layout.Layout, "count", count)
    monkeypatch.setattr(kernels, "count_by_sequence", count_by_sequence)


def _failures(rows):
    return {row["what"]: row["message"] for row in rows if row["status"] == FAILED}


def test_a_wrong_count_fails_every_part_that_counts(monkeypatch):
    _count_twice_the_last_token(monkeypatch)
    strategies = list(gpu_exactness.strategies(SETTING))
    wrong = _failures(strategies)
    assert len(wrong) == len(strategies) and all("the load of routers." in message for message in wrong.values())
    ways = list(gpu_exactness.ways(SETTING))
    wrong = _failures(ways)
    assert len(wrong) == len(ways) and all("a token was counted twice" in message for message in wrong.values())
    pooled = list(gpu_graphs.pooled_counts(SETTING))
    assert len(_failures(pooled)) == len(pooled)


def test_a_wrong_loss_or_gradient_fails(monkeypatch):
    original = LoadBalancingLoss.slopes
    monkeypatch.setattr(LoadBalancingLoss, "slopes", lambda self, load: original(self, load) * 1.0001)
    wrong = {what for what in _failures(gpu_exactness.strategies(SETTING)) if "large" not in what}
    assert {what.split(",")[0] for what in wrong} >= {"lbl", "lbl:scope=micro_batch"}


def test_compiled_loads_that_differ_from_eager_ones_fail(monkeypatch):
    original, calls = gpu_graphs.train_windows, []

    def train_windows(setting, options):
        result = original(setting, None)
        calls.append(options)
        if options is not None:
            result["loads"][0]["blocks.0.gate"][0] += 1
        return result

    monkeypatch.setattr(gpu_graphs, "train_windows", train_windows)
    (row,) = gpu_graphs.compile_modes(SETTING)
    assert row["status"] == FAILED and "the loads must be" in row["message"] and len(calls) == 2


def test_tests_that_fail_are_named(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<t><testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"/></t>')
    with pytest.raises(AssertionError, match="1 of 3 tests failed: b"):
        gpu_costs.read_report(report)
    report.write_text('<t><testcase name="a"/><testcase name="c"><skipped/></testcase></t>')
    assert gpu_costs.read_report(report) == {"passed": 1, "skipped": 1}
    assert all((ROOT / "tests" / file).exists() for file in gpu_costs.TESTS)


def test_the_stored_page_is_what_the_stored_result_gives():
    assert gpu.stored_page() == gpu_page.PAGE.read_text()
    assert "**Nothing on this page has been seen on a GPU.**" in gpu_page.page(gpu.PARTS, None)
    assert all(f"| {part.title} |" in gpu_page.page(gpu.PARTS, None) for part in gpu.PARTS)


def test_the_page_of_a_gpu_says_what_was_not_seen():
    entries = [gpu.entry(part, OK, "") for part in gpu.PARTS]
    entries[3] = gpu.entry(gpu.PARTS[3], NOT_RUN, "no time was left of 480 s")
    facts = {"command": "make gpu", "hardware": "a GPU", "date": "2026-01-01", "versions": {}}
    page = gpu_page.page(gpu.PARTS, {**facts, "device": "cuda", "small": False, "parts": entries})
    assert "This was seen on one GPU, with one rank. 8 of 9 parts are ok. Not run, so not seen: CUDA graphs." in page
    assert "Nothing on this page" not in page
