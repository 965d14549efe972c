"""The pages of speed are what the stored results give, and what they are measured with is tested on small sizes."""

import importlib
import re
from pathlib import Path

import pytest

overhead = importlib.import_module("overhead")
page_parts = importlib.import_module("page_parts")
speed = importlib.import_module("speed")
speed_costs = importlib.import_module("speed_costs")
speed_lab = importlib.import_module("speed_lab")

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def test_make_bench_runs_scripts_that_exist_and_writes_the_pages_last():
    (names,) = (
        line.split(" in ")[1].split(";")[0].split()
        for line in MAKEFILE.read_text().splitlines()
        if "benchmarks/$$name.py" in line
    )
    assert names[-1] == "speed"
    assert all((speed.ROOT / "benchmarks" / f"{name}.py").exists() for name in names)


def test_alerts_are_timed_in_usual_windows_and_in_windows_that_judge():
    row = overhead.alerts(layers=2, experts=4, k=2, tokens=64, rounds=1)
    assert (row["layers"], row["experts"]) == (2, 4)
    assert min(row["milliseconds"], row["milliseconds_judged"], row["milliseconds_mean"]) > 0


@pytest.mark.slow
def test_collectives_are_timed_on_ranks_that_pool():
    row = overhead.collectives(layers=2, experts=16, tokens=32, rounds=3)
    assert (row["ranks"], row["collectives"], row["collective_bytes"]) == (2, 1, 8 * 2 * 16)
    assert row["milliseconds"] > 0 and row["milliseconds_alone"] > 0 and row["ratio"]["rounds"] == 3


def test_the_pages_are_what_the_stored_results_give():
    stored = speed.results()
    pages = speed.pages(stored)
    assert pages == {path: path.read_text() for path in (speed.PAGE, speed.LAB_PAGE)}
    changed = speed.pages({**stored, "trainer": {**stored["trainer"], "tokens_per_step": 1}})
    assert changed[speed.PAGE] == pages[speed.PAGE] and changed[speed.LAB_PAGE] != pages[speed.LAB_PAGE]


def test_the_table_of_targets_has_each_once_and_links_to_its_section():
    pages = {path.name: text for path, text in speed.pages(speed.results()).items()}
    targets = pages["speed.md"].split("\n## ")[1]
    rows = re.findall(r"^\| (.+?) \| .+ \| (?:met|\*\*missed\*\*) \| (.*) \|$", targets, re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows) == int(re.search(r"Of (\d+) targets", targets)[1])
    for _, link in rows:
        if link:
            title, page = re.fullmatch(r"\[(.+)\]\((.*)#.+\)", link).groups()
            assert f"\n## {title}\n" in pages[page or "speed.md"]


def test_the_index_of_the_evidence_has_the_figures_of_the_page():
    index, page = (speed.PAGE.with_name(name).read_text() for name in ("index.md", speed.PAGE.name))
    ratios = {row["strategy"]: row["ratio"] for row in speed.results()["overhead"]["steps"] if "ratio" in row}
    for strategy in ("loss-free", "lbl:scope=global_batch", "quantile"):
        assert f"`{strategy}`: {page_parts.format_ratio(ratios[strategy])}" in index
    number, missed = re.search(r"Of (\d+) targets, \d+ are met and (\d+) are missed", page).groups()
    assert f"Of {number} targets for cost and speed, {missed} are missed" in index


def test_the_page_explains_a_target_only_if_it_is_missed():
    stored = speed.results()
    unbalanced, *rows = stored["overhead"]["steps"]

    def page(holds, median):
        changed = [
            {**row, "holds": holds, "ratio": {**row["ratio"], "median": median}} if row["limit"] is not None else row
            for row in rows
        ]
        return speed.costs_page({**stored, "overhead": {**stored["overhead"], "steps": [unbalanced, *changed]}})

    assert not any(reason in page(True, 1.0) for reason in speed_costs.STEP_REASONS.values())
    assert all(reason in page(False, 2.0) for reason in speed_costs.STEP_REASONS.values())
    assert speed_costs.INTERVAL_REASON in page(False, 1.0) and speed_costs.INTERVAL_REASON not in page(False, 2.0)


def test_a_miss_is_explained_even_without_a_section():
    stored = speed.results()
    audit = {**stored["audit"], "over_bare_forwards": {**stored["audit"]["over_bare_forwards"], "holds": False}}
    page = speed.costs_page({**stored, "audit": audit})
    assert "**Missed: work of an audit over the bare forwards, 98,304 tokens (target: 1.2).** Besides" in page


def test_only_alerts_and_collectives_may_be_missing_from_an_older_result():
    stored = speed.results()
    optional = {
        "alerts": [
            {"layers": 7, "experts": 5, "milliseconds": 1.0, "milliseconds_judged": 2.0, "milliseconds_mean": 1.1}
        ],
        "collectives": [
            {
                "layers": 7,
                "experts": 5,
                "ranks": 2,
                "milliseconds": 1.0,
                "milliseconds_alone": 0.5,
                "ratio": {"median": 2.0, "low": 1.9, "high": 2.1},
                "collectives": 1,
                "collective_bytes": 280,
            }
        ],
    }
    older = {name: value for name, value in stored["overhead"].items() if name not in optional}
    with_rows, without = (speed.costs_page({**stored, "overhead": {**older, **rows}}) for rows in (optional, {}))
    assert "## Alerts" in with_rows and "7 x 5" in with_rows
    assert "## Alerts" not in without and "7 x 5" not in without and "## Collectives" in without
    for name in older.keys() - {"command", "date", "hardware", "versions"}:
        with pytest.raises(KeyError):
            speed.costs_page({**stored, "overhead": {key: value for key, value in older.items() if key != name}})


def test_a_ratio_says_which_way_is_faster():
    assert speed_lab.faster_way({"low": 1.01, "high": 1.2}) == "the lab's way"
    assert speed_lab.faster_way({"low": 0.8, "high": 0.99}) == "the other way"
    assert speed_lab.faster_way({"low": 0.9, "high": 1.1}) == "undecided"
    row = {"compile_seconds": 30.0, "seconds_lab": 1.0, "ratio": {"median": 0.9, "low": 0.8, "high": 0.95}}
    assert speed_lab.steps_to_pay_back(row) == "300"
    assert speed_lab.steps_to_pay_back({**row, "ratio": {"median": 0.9, "low": 0.8, "high": 1.05}}) == ""


def test_the_page_says_if_other_programs_disturbed_a_measurement():
    notes = [page_parts.disturbance_note({"cores_of_others": cores}) for cores in (None, 0.0, 1.3)]
    assert notes[:2] == [[], []] and "1.3 cores" in notes[2][0]
