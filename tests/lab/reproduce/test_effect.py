"""A claim may state the effect that its seeds are planned for; the page says what power they have for it."""

from dataclasses import replace

import pytest
from claim_runs import ANY, store

from equipoise_lab.analysis import Hypothesis, power, seeds_needed
from equipoise_lab.reproduce.claim import parse_claim
from equipoise_lab.reproduce.command import as_json
from equipoise_lab.reproduce.page import pages
from equipoise_lab.reproduce.page.wording import power_text
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import findings

CLAIM = parse_claim(
    "x",
    {
        "title": "t",
        "source": "s",
        "paper": "p",
        "size": "small",
        "seeds": 8,
        "arms": {"a": {"strategy": "none"}, "b": {"strategy": "loss-free"}},
        "primary": {"statistic": "val_nats", "of": "a", "against": "b", "claim": "lower", "effect": -0.02},
    },
    ANY.sizes,
    ANY.name,
)
START = "Loss, a − b: if the true value is −0.0200,"


def _fill(results, differences):
    for seed, difference in enumerate(differences):
        store(results, CLAIM.job("a", seed), 5.0 + difference)
        store(results, CLAIM.job("b", seed), 5.0)


def _with(**change):
    return replace(CLAIM, primary=replace(CLAIM.primary, **change))


def _text(claim, results, others=0):
    """What the page says, with so many more claims in the family."""
    family = [claim, *(replace(claim, name=f"x{number}") for number in range(others))]
    return power_text(findings(family, results)[0])


def test_the_page_says_what_power_the_planned_seeds_have_at_the_spread_seen(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.03, 0.0, -0.01, -0.02])
    (finding,) = findings([CLAIM], results)
    expected = power(Hypothesis("lower"), -0.02, finding.estimate.sd, 8)
    assert finding.power == pytest.approx(expected) and 0.8 < expected < 0.99
    percent = f"{100 * expected:.0f} %"
    sentence = f"{START} and the spread that of these 4 seeds, 8 seeds support the claim with {percent} power."
    assert power_text(finding) == sentence
    text = pages("p.md", ANY, [CLAIM], [finding], results)["p_mechanisms.md"]
    assert f"\n\n{sentence}\n\nAll runs of this claim" in text
    assert as_json([finding])[0]["effect"] == -0.02 and as_json([finding])[0]["power"] == pytest.approx(expected)


def test_power_is_that_of_a_verdict_that_is_corrected_for_the_number_of_claims(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.03, 0.0, -0.01, -0.02])
    alone, in_family = _text(CLAIM, results), _text(CLAIM, results, others=15)
    (finding,) = findings([CLAIM], results)
    sd, level = finding.estimate.sd, 1 - 0.05 / 16
    low = power(Hypothesis("lower"), -0.02, sd, 8, level=level)
    needed = seeds_needed(Hypothesis("lower"), -0.02, sd, level=level)
    assert alone != in_family and in_family.endswith(f"with {100 * low:.0f} % power; 80 % takes about {needed} seeds.")


def test_a_power_that_no_number_of_seeds_gives_is_out_of_reach(tmp_path):
    results = Results(tmp_path)
    _fill(results, [-0.03, 0.0, -0.01, -0.02])
    small = _text(_with(effect=-0.001), results)
    assert small.endswith(" % power. 80 % is out of reach: it takes more than 100 seeds.")
    opposite = _text(_with(effect=0.02), results)
    assert opposite.endswith("less than 1 % power. 80 % is out of reach: this is not what the claim says.")
    assert "more than 99 % power." in _text(_with(effect=-0.1), results)
    equal = _text(_with(claim="equal", margin=0.05, effect=0.0), results)
    assert equal.startswith("Loss, a − b: if the true value is 0.0000,") and "more than 99 % power." in equal


def test_power_is_not_known_before_three_seeds_or_without_a_margin(tmp_path):
    results = Results(tmp_path)
    unknown = f"{START} the power of 8 seeds is not known yet."
    for differences in ([], [-0.02], [-0.02, -0.01]):
        _fill(results, differences)
        assert _text(CLAIM, results) == unknown
    _fill(results, [-0.02, -0.01, 0.0])
    assert _text(CLAIM, results) != unknown and _text(_with(claim="equal"), results) == unknown
    assert _text(_with(effect=None), results) == ""
