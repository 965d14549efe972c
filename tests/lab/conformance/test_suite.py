"""What the suite must be made of: short drivers, places for wrong answers, scripts without equipoise, pages."""

import ast
import json
import re
from pathlib import Path

import pytest
from conformance_pages import check_pages

from equipoise_lab.conformance import places, runner
from equipoise_lab.conformance.scenarios import SCENARIOS

ROOT = Path(__file__).parents[3]
SUITE = ROOT / "src" / "equipoise_lab" / "conformance"
REPRODUCTIONS = ROOT / "docs" / "evidence" / "reproductions"
STORED = json.loads((ROOT / "benchmarks" / "results" / "conformance.json").read_text(encoding="utf-8"))
NEWEST = {framework: next(iter(releases.values())) for framework, releases in STORED["answers"].items()}
DEFECTS = (ROOT / "docs" / "evidence" / "known_defects.md").read_text(encoding="utf-8")
SCRIPTS = sorted(REPRODUCTIONS.rglob("*.py"))


@pytest.mark.parametrize("name", runner.FRAMEWORKS.values())
def test_a_driver_is_short_and_says_where_its_use_is_documented(name):
    module, cls = name.split(":")
    source = (SUITE / "drivers" / f"{module}.py").read_text(encoding="utf-8")
    assert len([line for line in source.splitlines() if line.strip()]) <= 100
    (driver,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == cls]
    assert "INTENDED_USE" in ast.unparse(driver)


@pytest.mark.parametrize("framework", runner.FRAMEWORKS)
def test_places_are_those_of_wrong_answers(framework):
    wrong = {verdict["scenario"] for verdict in NEWEST[framework] if verdict["kind"] == "wrong"}
    assert set(places.places_of(framework)) == wrong
    for place in places.places_of(framework).values():
        assert re.search(r"\.py:\d+$", place.file)
        assert re.fullmatch(r"([\w.-]+/[\w.-]+#\d+)?", place.thread)
        assert place.note.endswith(".")


@pytest.mark.parametrize("framework", runner.FRAMEWORKS)
def test_all_questions_were_asked(framework):
    for verdicts in STORED["answers"][framework].values():
        assert {verdict["scenario"] for verdict in verdicts} == set(SCENARIOS)


def test_the_pages_are_those_of_the_stored_answers():
    assert check_pages(STORED) is None


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_the_number_of_questions_that_a_page_names(page):
    assert f"{len(SCENARIOS)} questions" in (ROOT / page).read_text(encoding="utf-8")


def test_equipoise_is_right_in_all():
    assert {verdict["kind"] for verdict in NEWEST["equipoise"]} == {"right"}


def test_all_frameworks_take_at_most_half_an_hour():
    assert sum(STORED["seconds"].values()) <= 1800


@pytest.mark.parametrize("framework", [name for name in runner.FRAMEWORKS if name != "equipoise"])
def test_every_wrong_answer_has_a_script(framework):
    """Of its own, or one that its place names: "as `other-scenario`"."""
    scripts = {path.stem.replace("_", "-") for path in SCRIPTS if path.parent.name == framework}
    for name, place in places.places_of(framework).items():
        assert name in scripts or scripts & set(re.findall(r"`([\w-]+)`", place.note)), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPRODUCTIONS)))
def test_a_script_stands_alone(script):
    source = script.read_text(encoding="utf-8")
    assert source.count("\n") <= 40
    assert "equipoise" not in source
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_a_known_defect_names_its_scenarios(scenario):
    for number in scenario.defects:
        (row,) = re.findall(rf"^\| {number} \|.*$", DEFECTS, re.MULTILINE)
        assert f"`{scenario.name}`" in row, f"row {number} of known_defects.md must name {scenario.name}"
