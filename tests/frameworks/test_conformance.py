"""The answers of this environment's framework to the conformance suite are those of the stored table."""

import json
import math
import os
from pathlib import Path

import pytest

from equipoise_lab.conformance import run
from equipoise_lab.conformance.scenarios import SCENARIOS

NAME = os.environ["EQUIPOISE_FRAMEWORK"]
DRIVERS = ["olmo_core", "olmo_core_v2"] if NAME == "olmo_core" else [NAME]
STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "conformance.json"


@pytest.mark.parametrize("framework", DRIVERS)
def test_the_table_is_what_the_release_answers(framework):
    answers = run(framework, list(SCENARIOS))
    stored = json.loads(STORED.read_text(encoding="utf-8"))["answers"][framework][answers[0].version]
    assert [(a.scenario, a.kind) for a in answers] == [(s["scenario"], s["kind"]) for s in stored]
    for answer, in_table in zip(answers, stored, strict=True):
        if answer.kind == "wrong" and math.isfinite(answer.error):
            assert answer.error == pytest.approx(in_table["error"], rel=1e-3), answer.scenario
