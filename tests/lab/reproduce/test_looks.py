"""A claim with several looks: it stops at the first that decides it, and its p pays for all of them."""

from dataclasses import replace
from types import MappingProxyType

import pytest
from claim_runs import ANY, CLAIM, Quiet, page_text, store

from equipoise_lab.analysis import Hypothesis, power
from equipoise_lab.reproduce import command
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import findings

LOOKS = replace(CLAIM, seeds=3, looks=(3, 6))


def _edition(*claims):
    return replace(ANY, claims=MappingProxyType({each.name: each for each in claims}), frontiers=MappingProxyType({}))


def _reproduce(tmp_path, monkeypatch, differences, *others):
    """The findings and the number of stored runs, where each run of a seed has its difference."""

    def execute(jobs, results, work, progress, **more):
        for job in results.missing(jobs):
            options = dict(job.options)
            store(results, job, 5.0 + (differences[options["seed"]] if options["strategy"] == "none" else 0.0))
        return True

    monkeypatch.setattr(command, "execute", execute)
    monkeypatch.setattr(Reproduce, "load_edition", lambda options: _edition(LOOKS, *others))
    monkeypatch.setattr(Reproduce, "check", lambda options: None)
    options = Reproduce(claim="all" if others else LOOKS.name, results=tmp_path / "results", out=tmp_path / "out")
    quiet = Quiet()
    verdicts = command.reproduce(options, quiet)
    return verdicts, len(list((tmp_path / "results").rglob("*.json"))), quiet.lines


def test_a_claim_stops_at_the_look_that_decides_it(tmp_path, monkeypatch):
    verdicts, runs, _ = _reproduce(tmp_path, monkeypatch, [-0.1, -0.11, -0.09, 9, 9, 9])
    assert runs == 6 and verdicts[0].estimate.n == 3 and verdicts[0].verdict == "supported"
    assert verdicts[0].judgement.p_adjusted == pytest.approx(2 * verdicts[0].judgement.p)


def test_an_undecided_claim_goes_on_to_the_next_look(tmp_path, monkeypatch):
    verdicts, runs, lines = _reproduce(tmp_path, monkeypatch, [-0.1, 0.1, 0.0, -0.1, 0.1, 0.0])
    assert runs == 12 and verdicts[0].estimate.n == verdicts[0].planned == 6 and verdicts[0].verdict == "undecided"
    assert "x is undecided: it goes on to 6 seeds" in lines


def test_a_look_counts_once_all_its_runs_are_stored(tmp_path):
    edition, results = _edition(LOOKS), Results(tmp_path / ANY.name)
    for seed in range(5):
        for arm in LOOKS.arms:
            store(results, LOOKS.job(arm, seed), 5.0 if arm == "b" else 4.9 - seed / 1000)
    assert edition.claims_with_values(results)[0].seeds == 3
    for arm in LOOKS.arms:
        store(results, LOOKS.job(arm, 5), 5.0)
    assert edition.claims_with_values(results)[0].seeds == 6


def test_two_looks_at_an_interval_that_excludes_zero_may_be_undecided(tmp_path):
    """p = 0.034 for one look; for two it is 0.068."""
    results = Results(tmp_path)
    for seed, difference in enumerate([-0.1, -0.03, -0.08, 0.0, -0.07, -0.01]):
        for arm in CLAIM.arms:
            store(results, CLAIM.job(arm, seed), 5.0 + (difference if arm == "a" else 0.0))
    one, two = (findings([replace(CLAIM, seeds=6, looks=looks)], results)[0] for looks in ((), (3, 6)))
    assert 0.025 < one.judgement.p < 0.05 and one.estimate == two.estimate
    assert (one.verdict, two.verdict) == ("supported", "undecided")


def test_power_pays_for_the_looks(tmp_path):
    results = Results(tmp_path)
    planned = replace(LOOKS, primary=replace(LOOKS.primary, effect=-0.05))
    for seed, difference in enumerate([-0.04, -0.01, -0.03]):
        for arm in CLAIM.arms:
            store(results, CLAIM.job(arm, seed), 5.0 + (difference if arm == "a" else 0.0))
    finding = findings([planned], results)[0]
    expected = power(Hypothesis("lower"), -0.05, finding.estimate.sd, LOOKS.looks[-1], level=0.975)
    assert finding.power == pytest.approx(expected)
    assert f", {LOOKS.looks[-1]} seeds support the claim" in page_text([planned], [finding], results)


def test_a_claim_whose_text_is_not_here_is_left_out_says_so_and_stops_no_other(tmp_path, monkeypatch):
    arms = {name: {**options, "data": str(tmp_path / "text")} for name, options in CLAIM.arms.items()}
    other = replace(CLAIM, name="y", arms=arms)
    _, runs, lines = _reproduce(tmp_path, monkeypatch, [-0.1, 0.1, 0.0, -0.1, 0.1, 0.0], other)
    assert any(line.startswith(f"y must have its text in {tmp_path / 'text'}") for line in lines)
    assert runs == 12, "x went on to its second look"
    assert lines[-1].startswith("runs are missing for y")
