"""What the page concludes from finished runs."""

import re

import pytest
from helpers.recorded_runs import make_run, runs_of, sentences_of

from equipoise_lab.records import find_runs
from equipoise_lab.report.findings import compare_runs


def test_a_consistent_lead_wins_and_shows_its_interval(tmp_path):
    findings = compare_runs(runs_of(tmp_path, best=[2.0, 3.0, 2.5], worse=[2.1, 3.12, 2.59]))
    headline, quality, *_ = sentences_of(findings)
    assert headline.startswith("best won: its loss is significantly lower than with worse.")
    assert "Its load is also the most even." in headline
    # 0.10, 0.12, 0.09: mean 0.10333, sd 0.015275, t(2) 4.3027, so 0.0654 to 0.1413; exp(0.10333) is 10.9 % more
    assert (
        "Next is worse: 0.103 nats higher, 10.9 % in perplexity (95 % interval of the difference: 0.065 to 0.141"
        in quality
    )
    [comparison] = findings.comparisons
    assert comparison.strategy == "worse" and comparison.verdict == "significant"
    assert comparison.nats.estimate.mean == pytest.approx(0.31 / 3)


def test_a_lead_within_the_noise_does_not_win_and_names_the_seeds_needed(tmp_path):
    findings = compare_runs(runs_of(tmp_path, best=[2.0, 3.0, 2.5], other=[2.3, 2.9, 2.6]))
    headline, quality, *_ = sentences_of(findings)
    assert headline.startswith("No strategy won: best has the lowest loss, but its lead may be chance.")
    assert re.search(r"Confirming a difference of this size would take about \d+ seeds\.", quality)
    assert findings.comparisons[0].verdict == "undecided"


def test_the_seeds_needed_account_for_the_family(tmp_path):
    """The lead over the next is half its standard deviation. With five comparisons this takes 51 seeds (tables for 1 %,
    two-sided); with a single comparison it would take 34 (5 %)."""
    far = {f"far{number}": [4.0, 4.1, 4.2] for number in range(4)}
    findings = compare_runs(runs_of(tmp_path, best=[2.0, 2.0, 2.0], next=[1.9, 2.1, 2.3], **far))
    assert len(findings.comparisons) == 5
    assert "Confirming a difference of this size would take about 51 seeds." in sentences_of(findings)[1]


def test_the_headline_separates_beaten_from_unbeaten_strategies(tmp_path):
    findings = compare_runs(runs_of(tmp_path, b=[2.0, 3.0, 2.5], far=[3.0, 4.0, 3.51], near=[2.1, 2.97, 2.6]))
    assert (
        "b has the lowest loss. It is significantly lower than with far; the lead over near may be chance."
        in sentences_of(findings)[0]
    )


def test_significance_is_adjusted_for_the_family(tmp_path):
    """A comparison that is significant alone is not significant together with two others that are not."""
    alone = compare_runs(runs_of(tmp_path / "a", b=[2.0, 2.0, 2.0], one=[2.1, 2.2, 2.3]))
    assert alone.comparisons[0].nats.p == pytest.approx(0.0742, abs=1e-4)
    pair = dict(b=[2.0, 2.0, 2.0], one=[2.15, 2.2, 2.28])
    assert compare_runs(runs_of(tmp_path / "b", **pair)).comparisons[0].is_beaten
    family = compare_runs(runs_of(tmp_path / "c", **pair, x=[1.9, 2.8, 2.0], y=[1.8, 2.9, 2.1]))
    assert not next(comparison for comparison in family.comparisons if comparison.strategy == "one").is_beaten


def test_one_seed_decides_nothing(tmp_path):
    findings = compare_runs(runs_of(tmp_path, best=[2.0], worse=[4.0]))
    headline, balance, specialisation, quality, *_ = sentences_of(findings)
    assert headline == (
        "best has the most even load: MaxVio 0.40, against 0.50 with worse. Experts tell most about a token's domain "
        "under best: 0.25 bits. Loss is undecided: one seed cannot tell 2.000 from 4.000 nats."
    )
    assert balance.startswith("Balance.") and specialisation.startswith("Specialisation.")
    assert "This is one seed. Run at least three (--seeds 3)" in quality
    assert findings.comparisons[0].verdict == "one seed: undecided"


def test_only_shared_seeds_are_compared(tmp_path):
    """Over all its seeds, a has the lower mean. Over the shared seeds, b has."""
    findings = compare_runs(runs_of(tmp_path, a=[2.0, 3.0, 0.1], b=[1.9, 2.8]))
    assert findings.best == "b" and findings.comparisons[0].nats.estimate.n == 2
    assert "The comparison uses the seeds that all share: 0, 1." in sentences_of(findings)[1]


def test_a_strategy_without_a_common_seed_is_left_out_and_named(tmp_path):
    runs_of(tmp_path, b=[2.0, 3.0, 2.5], one=[3.0, 4.0, 3.5], two=[3.1, 4.1, 3.61])
    make_run(tmp_path / "apart", "apart", nats=0.1, seed=9)
    findings = compare_runs(find_runs(tmp_path))
    headline, left_out, *_ = sentences_of(findings)
    assert headline.startswith("b won: its loss is significantly lower than with one and two.")
    assert left_out == "Left out of the comparison: apart. No seed is shared with the others."
    assert {comparison.strategy for comparison in findings.comparisons} == {"one", "two"}


def test_without_a_seed_of_all_strategies_the_most_frequent_one_decides(tmp_path):
    """a and b share seed 1, b and c share seed 2. The lower of these equally frequent seeds decides."""
    for name, seed, nats in (("a", 0, 3.0), ("a", 1, 3.0), ("b", 1, 2.9), ("b", 2, 3.4), ("c", 2, 3.2)):
        make_run(tmp_path / f"{name}{seed}", name, nats=nats, seed=seed)
    findings = compare_runs(find_runs(tmp_path))
    assert findings.best == "b" and [comparison.strategy for comparison in findings.comparisons] == ["a"]
    assert "c. No seed is shared with the others" in sentences_of(findings)[1]
    assert "Next is a: 0.100 nats higher" in " ".join(sentences_of(findings))


def test_balance_specialisation_and_dead_experts_are_reported(tmp_path):
    make_run(tmp_path / "a", "none", nats=2.0, maxvio=2.5, bits=0.9)
    make_run(tmp_path / "b", "lbl", nats=2.1, maxvio=0.2, bits=0.1)
    make_run(tmp_path / "c", "loss-free", nats=2.4, maxvio=0.3, bits=0.5)
    headline, balance, information, quality, dead = sentences_of(compare_runs(find_runs(tmp_path)))
    assert headline.startswith("lbl has the most even load: MaxVio 0.20, against 2.50 with none.")
    assert "most about a token's domain under none: 0.90 bits. Loss is undecided" in headline
    assert "none reaches a loss of 2.000 nats per token (perplexity 7.39)" in quality
    assert (
        "lbl spreads" in balance
        and "1.20 times the mean" in balance
        and "The least even is none: 3.50 times" in balance
    )
    assert "under none: 0.900 of at most 1.00 bits" in information and "under lbl: 0.100 bits" in information
    assert "of 8 in all layers together: none 3, lbl 3" in dead
