"""equipoise is right in every scenario, and every scenario finds a defect."""

import re

import pytest
from lab.conformance.broken import BROKEN, verdicts_on_rank
from ranks import run_on_ranks

from equipoise_lab.conformance.drivers.equipoise import Equipoise
from equipoise_lab.conformance.scenarios import SCENARIOS

ONE_RANK = [name for name, scenario in SCENARIOS.items() if scenario.ranks == 1]
TWO_RANKS = [name for name, scenario in SCENARIOS.items() if scenario.ranks == 2]


@pytest.mark.parametrize("name", ONE_RANK)
def test_equipoise_is_right(name):
    measurement = SCENARIOS[name].problem(Equipoise, 0)
    assert measurement.is_right, measurement


@pytest.mark.parametrize("name", ONE_RANK)
def test_a_driver_with_a_defect_is_wrong(name):
    measurement = SCENARIOS[name].problem(BROKEN[name], 0)
    assert not measurement.is_right, measurement


def test_on_two_ranks_equipoise_is_right_and_a_defect_is_found():
    on_ranks = run_on_ranks(2, verdicts_on_rank, TWO_RANKS)
    for name in TWO_RANKS:
        ours, broken = zip(*(answers[name] for answers in on_ranks), strict=True)
        assert all(ours), name
        assert not all(broken), name


def test_every_scenario_has_a_driver_with_its_defect():
    assert set(BROKEN) == set(SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_a_scenario_says_what_it_asks_and_why(scenario):
    assert scenario.question.endswith("?")
    assert 1 <= len(re.findall(r"[.](?= |$)", scenario.why)) <= 3, scenario.why
    assert scenario.defects, "it must name a known defect that it finds"
