"""Run folders: reading, writing, and damage by a kill at any moment."""

import json
import math
import os
import shutil

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.records import Run, files, find_runs, read_json, write_json


def _run(tmp_path, steps=3):
    run = Run.create(tmp_path / "run", {"strategy": "none", "name": "maß"})
    for step in range(1, steps + 1):
        run.append("steps", {"step": step, "loss": 1.0 / step})
        run.append("loads", {"step": step, "load": [[step, 0]]})
    run.append("evaluations", {"step": steps, "nats": 2.5})
    return run


def test_a_run_reads_back_what_was_written(tmp_path):
    run = _run(tmp_path)
    again = Run(run.path)
    assert again.config == {"format": 1, "strategy": "none", "name": "maß"}
    assert list(again.rows("steps")) == [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3)]
    assert list(again.rows("loads"))[-1] == {"step": 3, "load": [[3, 0]]}
    assert [row["nats"] for row in again.rows("evaluations")] == [2.5]
    assert not again.complete
    run.finish({"nats": 2.5})
    assert again.complete and again.result == {"nats": 2.5}


def test_a_log_that_was_never_written_is_empty(tmp_path):
    assert list(Run.create(tmp_path / "run", {}).rows("steps")) == []


@pytest.mark.parametrize("cut", [1, 2, 5, 12])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    run = _run(tmp_path)
    path = run.path / "steps.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    steps = [row["step"] for row in run.rows("steps")]
    # If only its newline is missing, the last line is complete and may be kept.
    assert steps == [1, 2] or (cut == 1 and steps == [1, 2, 3])
    assert path.read_bytes() == whole[:-cut], "reading changed the file"


@pytest.mark.parametrize("cut", [1, 2, 5, 12])
def test_a_run_can_continue_after_a_torn_line(tmp_path, cut):
    run = _run(tmp_path)
    path = run.path / "steps.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run.rewind(2)
    run.append("steps", {"step": 3, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in run.rows("steps")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_every_cut_of_a_log_reads_as_its_first_lines(tmp_path):
    run = _run(tmp_path)
    path = run.path / "steps.jsonl"
    whole = path.read_bytes()
    rows = list(run.rows("steps"))
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        rows_read = list(run.rows("steps"))
        assert rows_read == rows[: len(rows_read)]
        assert len(rows_read) in (whole[:end].count(b"\n"), whole[:end].count(b"\n") + 1)


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"[1, 2]", b'{"loss": 1}', b"\xff\xfe", b"nonsense"])
def test_the_error_for_a_damaged_line_names_file_and_line(tmp_path, damage):
    run = _run(tmp_path)
    path = run.path / "steps.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(EquipoiseError, match=r"steps\.jsonl must have one JSON object per line: line 2 is damaged"):
        list(run.rows("steps"))


def test_a_damaged_last_line_with_a_newline_is_an_error(tmp_path):
    run = _run(tmp_path)
    with open(run.path / "steps.jsonl", "ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(EquipoiseError, match="line 4 is damaged"):
        list(run.rows("steps"))


def test_rewind_drops_what_came_after_a_step(tmp_path):
    run = _run(tmp_path)
    run.finish({"nats": 1})
    run.rewind(2)
    assert [row["step"] for row in run.rows("steps")] == [1, 2]
    assert [row["step"] for row in run.rows("loads")] == [1, 2]
    assert list(run.rows("evaluations")) == []
    assert not run.complete
    run.rewind(0)
    assert list(run.rows("steps")) == []
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.json",
        "evaluations.jsonl",
        "loads.jsonl",
        "steps.jsonl",
    ]


def test_rewind_keeps_every_number_exactly(tmp_path):
    run = Run.create(tmp_path / "run", {})
    row = {"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "load": [[2**60]], "text": "ÿ\u2028"}
    run.append("steps", row)
    run.rewind(1)
    assert list(run.rows("steps")) == [row]


@pytest.mark.parametrize("config", [{"format": 2}, {}, {"format": "1"}, []])
def test_another_format_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EquipoiseError, match="config.json must have format 1: got"):
        Run(tmp_path)


def test_a_missing_or_damaged_config_is_refused(tmp_path):
    with pytest.raises(EquipoiseError, match="A run folder must contain config.json"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text('{"format":')
    with pytest.raises(EquipoiseError, match="config.json must be JSON: .*damaged"):
        Run(tmp_path)


def test_a_missing_result_is_an_error(tmp_path):
    with pytest.raises(EquipoiseError, match="must contain result.json"):
        _run(tmp_path).result  # noqa: B018


@pytest.mark.parametrize("broken", ["replace", "fsync", "value"])
def test_write_json_leaves_the_old_text_or_the_new(tmp_path, monkeypatch, broken):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def fail(*args):
        raise OSError("killed")

    if broken != "value":
        monkeypatch.setattr(os, broken, fail)
    with pytest.raises((OSError, TypeError)):
        write_json(path, {"new": 2} if broken != "value" else {"new": object()})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"new": "ÿ"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"new": "ÿ"}
    assert os.listdir(tmp_path) == ["result.json"]


def test_find_runs_lists_runs_and_refuses_folders_without_runs(tmp_path):
    with pytest.raises(UsageError, match="Runs are read from a folder: .* does not exist"):
        find_runs(tmp_path / "nothing")
    with pytest.raises(UsageError, match="it contains none"):
        find_runs(tmp_path)
    run = _run(tmp_path)
    shutil.copytree(run.path, tmp_path / "another")
    assert [each.path.name for each in find_runs(tmp_path)] == ["another", "run"]
    assert [each.path for each in find_runs(run.path)] == [run.path]


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    run = Run.create(tmp_path / "run", {"rate": math.inf})
    run.append("steps", {"step": 1, "loss": math.nan, "load": [1, -math.inf]})
    assert run.config["rate"] is None
    assert list(run.rows("steps")) == [{"step": 1, "loss": None, "load": [1, None]}]
    assert b"NaN" not in (run.path / "steps.jsonl").read_bytes()


CONFIG = {"strategy": "none", "num_experts": 2, "layers": ["a", "b"]}


@pytest.mark.parametrize(
    ("log", "row", "reason"),
    [
        ("steps", {"step": "1"}, r"steps\.jsonl, line 1, must contain step .* valid integer, got '1'"),
        ("steps", {"step": True}, "must contain step .* valid integer, got True"),
        ("steps", {"step": 1, "loss": "low"}, "must contain loss .* valid number, got 'low'"),
        ("steps", {"step": 1, "maxvio_batch": -0.5}, "must contain maxvio_batch .* greater than or equal to 0"),
        ("steps", {"step": 1, "alerts": "dead"}, "must contain alerts .* valid list"),
        ("steps", {"step": 2}, "line 1, must follow step 0: it is of step 2"),
        ("loads", {"step": 1}, r"loads\.jsonl, line 1, must contain load: it does not"),
        ("loads", {"step": 1, "load": [[1, 2]]}, r"the load of 2 layers of 2 experts: it has layers of \[2\]"),
        ("loads", {"step": 1, "load": [[1, 2], [3]]}, r"it has layers of \[2, 1\]"),
        ("loads", {"step": 1, "load": [[1, 2], [3, -4]]}, r"must contain load\.1\.1 .* greater than or equal to 0"),
        ("loads", {"step": 1, "load": [[1, 2], [3, 2**49]]}, r"must contain load\.1\.1 .* less than or equal to"),
        ("evaluations", {"step": 1, "domains": {}}, "must contain domains"),
        ("evaluations", {"step": 1, "domains": {"law": {"load": [[1]]}}}, "for domain 'law' must contain the load"),
        ("evaluations", {"step": 1, "domains": {"law": {"nats": [1]}}}, r"must contain domains\.law\.nats"),
    ],
)
def test_a_row_in_the_wrong_form_is_an_error_that_names_file_line_and_value(tmp_path, log, row, reason):
    run = Run.create(tmp_path / "run", CONFIG)
    run.append(log, row)
    with pytest.raises(EquipoiseError, match=reason):
        list(run.rows(log))


@pytest.mark.parametrize("order", [[1, 1], [1, 3], [2, 1]])
def test_a_line_that_is_missing_twice_or_out_of_order_is_an_error(tmp_path, order):
    run = Run.create(tmp_path / "run", CONFIG)
    for step in order:
        run.append("steps", {"step": step})
    with pytest.raises(EquipoiseError, match=r"must follow step \d: it is of step"):
        list(run.rows("steps"))


def test_two_evaluations_after_one_step_are_right_and_an_earlier_one_after_a_later_is_not(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    for step in (4, 8, 8):
        run.append("evaluations", {"step": step})
    assert [row["step"] for row in run.rows("evaluations")] == [4, 8, 8]
    run.append("evaluations", {"step": 4})
    with pytest.raises(EquipoiseError, match="line 4, must follow step 8: it is of step 4"):
        list(run.rows("evaluations"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1), ("seed", 1.5), ("steps", 0), ("layers", []), ("layers", ["a", "a"]), ("domains", "law"),
        ("notes", [1]), ("options", []), ("versions", {"torch": 2}), ("began", None), ("dtype", "float64"),
        ("learning_rate", "3e-3"), ("num_experts", 10**30),
    ],
)  # fmt: skip
def test_a_config_in_the_wrong_form_is_refused(tmp_path, key, value):
    with pytest.raises(EquipoiseError, match=rf"config\.json must contain {key}"):
        Run.create(tmp_path / "run", CONFIG | {key: value})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"NaN", "NaN is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b"\xff\xfe[\x00]\x00", "invalid start byte"),
        (b"9" * 5000, "Exceeds the limit"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_is_one_error(tmp_path, content, reason):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(EquipoiseError, match=f"result.json must be JSON: .*{reason}"):
        read_json(tmp_path / "result.json")


def test_a_record_beyond_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    run = Run.create(tmp_path / "run", CONFIG)
    run.append("steps", {"step": 1, "text": "a" * 900})
    run.append("steps", {"step": 2})
    assert len(list(run.rows("steps"))) == 2, "the limit is for a line, not for the file"
    run.append("steps", {"step": 3, "text": "a" * 1000})
    with pytest.raises(EquipoiseError, match=r"A line of .*steps\.jsonl must have at most 1,000 bytes"):
        list(run.rows("steps"))
    (run.path / "result.json").write_bytes(b"[" + b" " * 1000 + b"]")
    with pytest.raises(EquipoiseError, match=r"result\.json must have at most 1,000 bytes"):
        read_json(run.path / "result.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "steps.jsonl"])
def test_a_pipe_or_folder_in_place_of_a_record_is_refused_at_once(tmp_path, name):
    """Reading a pipe would wait for ever."""
    for make in (os.mkfifo, os.mkdir):
        run = Run.create(tmp_path / make.__name__, CONFIG)
        (run.path / name).unlink(missing_ok=True)
        make(run.path / name)
        with pytest.raises(EquipoiseError, match=f"A record must be a file: .*{name} is none"):
            list(Run(run.path).rows("steps"))


def test_a_link_in_place_of_a_temporary_file_leads_nowhere(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("years of work")
    run = _run(tmp_path)
    for name in ("config.json", "steps.jsonl"):
        (run.path / f".{name}.tmp").symlink_to(mine)
    write_json(run.path / "config.json", run.config)
    run.rewind(1)
    assert mine.read_text() == "years of work" and [row["step"] for row in run.rows("steps")] == [1]


def test_every_column_of_the_table_is_checked_in_a_result(tmp_path):
    from equipoise_lab.analysis.summary import COLUMNS

    run = _run(tmp_path)
    for column in COLUMNS:
        run.finish({column.key: "much"})
        with pytest.raises(EquipoiseError, match=f"result.json must contain {column.key} in the right form"):
            run.result  # noqa: B018
