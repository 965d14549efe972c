"""Verdicts come from stored results alone; the command runs what is missing and reports them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from claim_runs import CHOICE, CLAIM, FIRST, LEADERBOARD, Quiet, fill, page_text, store

from equipoise.errors import UsageError
from equipoise_lab.cli import main
from equipoise_lab.records import write_json
from equipoise_lab.reproduce import command
from equipoise_lab.reproduce.command import as_json, claim_rows, reproduce, table_rows
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.jobs import key_of
from equipoise_lab.reproduce.page.wording import result_text, verdict_text
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import MARGIN_OF, findings
from equipoise_lab.train import engine


@pytest.mark.parametrize(
    ("options", "has_bfloat16", "is_warned"),
    [
        ((), False, True),
        ((), True, False),
        (("--budget", "0"), False, False),
        (("--dtype", "float32"), False, False),
        (("--edition", "second"), False, False),  # its runs are in float32
    ],
)
def test_a_machine_without_bfloat16_warns_before_runs_start(monkeypatch, capsys, options, has_bfloat16, is_warned):
    calls = []
    monkeypatch.setattr(engine, "machine", lambda dtype: ("cpu", has_bfloat16))
    monkeypatch.setattr(command, "reproduce", lambda options, progress: calls.append(options) or [])
    main(["reproduce", "1-scope", "--edition", "first", *options])
    assert ("--dtype float32" in capsys.readouterr().err.replace("\n", " ")) == is_warned
    assert calls[0].dtype == ("float32" if "--dtype" in options else None)


def test_a_result_without_a_loss_leaves_the_claim_undecided(tmp_path):
    claim, results = replace(CLAIM, name=LEADERBOARD), Results(tmp_path)
    fill(results, [-0.1, -0.1, -0.1, -0.1])
    store(results, CLAIM.job("a", 1), None)
    (first, _) = findings([CLAIM], results)
    assert first.estimate.n == 3 and first.diverged == 1 and first.is_finished
    assert first.verdict == "undecided" and verdict_text(first) == "undecided, as runs diverged"
    assert as_json([first])[0]["planned"] == 4 and claim_rows([first])[0][1] == "undecided"
    for seed in range(4):
        store(results, CLAIM.job("a", seed), None)
    (first, _) = findings([CLAIM], results)
    assert result_text(first) == "4 of 4 seeds diverged" and not first.is_missing
    fill(results, [-0.1, -0.1, -0.1, -0.1])
    store(results, CLAIM.job("a", 1), None)
    assert "This comparison has no results yet" in page_text([claim], findings([claim], results), results)


def test_a_verdict_before_the_last_seed_says_so(tmp_path):
    results = Results(tmp_path)
    fill(results, [-0.1, -0.11, -0.09])
    (first, _) = findings([CLAIM], results)
    assert verdict_text(first) == "supported so far" == claim_rows([first])[0][1]
    fill(results, [-0.1, -0.11, -0.09, -0.1])
    assert verdict_text(findings([CLAIM], results)[0]) == "supported"
    far = replace(CLAIM, primary=replace(CLAIM.primary, claim="equal", margin=0.01))
    assert verdict_text(findings([far], results)[0]) == "not supported: a is lower"
    near = replace(CLAIM, primary=replace(CLAIM.primary, claim="equal", margin=0.099))
    assert verdict_text(findings([near], results)[0]) == "undecided; the mean is beyond the margin"


def test_two_seeds_give_no_estimate_of_how_many_are_needed(tmp_path):
    results = Results(tmp_path)
    fill(results, [-0.1, 0.09])
    assert verdict_text(findings([CLAIM], results)[0]) == "undecided"


@pytest.mark.parametrize(("differences", "is_known"), [((-0.3, -0.31, -0.29), True), ((-0.3, 0.2, 0.01), False)])
def test_the_margin_of_equality_needs_an_interval_that_excludes_zero(tmp_path, differences, is_known):
    results, scope = Results(tmp_path), replace(CLAIM, name=MARGIN_OF)
    fill(results, differences)
    equal = replace(CLAIM, primary=replace(CLAIM.primary, claim="equal"))
    finding = findings([scope, equal], results)[2]
    assert finding.claim is equal and finding.margin == (pytest.approx(0.1) if is_known else None)
    assert (finding.judgement is None) != is_known


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([], "undecided"),
        ([-0.1], "undecided"),
        ([-0.1, -0.11, -0.09, -0.1], "supported"),
        ([0.1, 0.11, 0.09, 0.1], "not supported"),
        ([-0.1, 0.09, -0.05, 0.04], "undecided"),
    ],
)
def test_verdicts_come_from_paired_differences(tmp_path, differences, verdict):
    results = Results(tmp_path)
    fill(results, differences)
    first, trend = findings([CLAIM], results)
    assert first.verdict == verdict and first.is_primary and not trend.is_primary
    if len(differences) > 1:
        assert first.estimate.n == len(differences)
        assert first.estimate.mean == pytest.approx(sum(differences) / len(differences))
        assert trend.estimate.mean == pytest.approx(-sum(differences) / len(differences))  # from a to b, one doubling


def test_one_claim_is_judged_in_the_family_of_all_claims(tmp_path):
    claim, results = FIRST.claims["2-specialisation"], FIRST.results(tmp_path)
    for seed, difference in enumerate((0.28, 0.3, 0.32)):
        for arm, gain in (("micro", 0.0), ("global", difference), ("loss-free", 0.0)):
            store(results, claim.job(arm, seed), 5.0)
            stored = results.get(claim.job(arm, seed))
            stored["result"] = {"domain_information_bits": 1.0 + gain}
            write_json(results.folder / f"{key_of(claim.job(arm, seed))}.json", stored)
    (first, *_) = reproduce(Reproduce(claim.name, "first", budget=0, results=tmp_path), Quiet())
    assert first.judgement.p_adjusted == pytest.approx(first.judgement.p * len(FIRST.claims))
    assert 0 < first.judgement.p < 0.06


def test_a_seed_that_only_one_arm_has_is_left_out(tmp_path):
    results = Results(tmp_path)
    fill(results, [-0.1, -0.11, -0.09])
    store(results, CLAIM.job("a", 3), 100.0)
    first, _ = findings([CLAIM], results)
    assert first.estimate.n == 3 and first.means["a"] == pytest.approx(5.9)


def test_an_undecided_claim_says_how_many_seeds_would_support_it(tmp_path):
    results = Results(tmp_path)
    fill(results, [-0.1, 0.02, -0.05, 0.01])
    (first, _) = findings([CLAIM], results)
    assert first.verdict == "undecided" and 5 < first.seeds_needed < 100
    assert f"undecided; about {first.seeds_needed} seeds would support it" in page_text([CLAIM], [first], results)


def test_a_budget_of_zero_runs_nothing_and_reports_stored_results(tmp_path):
    options = Reproduce("1-scope", "first", budget=0, out=tmp_path / "work", results=tmp_path / "results", json=True)
    reported = reproduce(options, Quiet())
    assert [finding.verdict for finding in reported] == ["undecided"] * len(reported)
    assert json.loads(json.dumps(as_json(reported)))[0]["seeds"] == 0
    assert table_rows(reported)[0][:2] == ("loss, global − micro", "lower")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claim": "9"}, "CLAIM must be all or one of"),
        ({"budget": -1.0}, "--budget must be a number of minutes"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"claim": "1-scope", "page": SimpleNamespace()}, "--page must go with all claims"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Reproduce(**{"edition": "first", **options}).check()


def test_claims_share_runs():
    chosen = dict.fromkeys(FIRST.frontiers, CHOICE)
    scope, special, same = (
        set(FIRST.claims[name].with_values(chosen).jobs())
        for name in ("1-scope", "2-specialisation", "4-loss-free-same-scope")
    )
    assert len(scope & special) == 6
    assert len(scope & same) == 8


def test_all_claims_fit_into_seven_hours_of_two_cores():
    """At a minute a small run and two and a half a standard run, each on one of two busy cores."""
    chosen = dict.fromkeys(FIRST.frontiers, CHOICE)
    jobs = {job for name in FIRST.claims for job in FIRST.claims[name].with_values(chosen).jobs()}
    jobs |= {job for frontier in FIRST.frontiers.values() for job in frontier.jobs(Results(Path("nowhere")))}
    minutes = {80: 1.0, 200: 2.5}
    assert sum(minutes[dict(job.options)["steps"]] for job in jobs) / 2 < 7 * 60


def test_the_shipped_results_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["reproduce", "--edition", "first", "--budget", "0"])
    out, err = capsys.readouterr()
    titles, *rows = out.splitlines()
    assert titles.split()[:2] == ["claim", "verdict"] and [row.split()[0] for row in rows] == list(FIRST.claims)
    assert max(map(len, rows)) < 80, "one line a claim, also in a terminal of 80 characters"
    assert re.search(r"^1-scope +supported +−0.0675 ", rows[0]) and "not run" not in out
    assert "not a folder" not in err and "equipoise reproduce CLAIM --budget 0" in err
    main(["reproduce", "1-scope", "--edition", "first", "--budget", "0", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["verdict"] == "supported" and "loss, global − micro" in err


def test_new_results_come_before_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Reproduce("1-scope", "first", budget=0)
    (shipped,) = [one for one in reproduce(options, Quiet()) if one.is_primary]
    claim = shipped.claim
    for arm in claim.primary.arms:
        for seed in claim.all_seeds:
            store(FIRST.results(options.results), claim.job(arm, seed), 1.0 + seed / 100)
    (ours,) = [one for one in reproduce(options, Quiet()) if one.is_primary]
    assert shipped.estimate.mean < -0.05 and ours.estimate.mean == 0


def test_a_claim_without_runs_is_not_run(tmp_path, capsys):
    main(["reproduce", "--edition", "first", "--budget", "0", "--results", str(tmp_path / "new")])
    out, err = capsys.readouterr()
    assert [row.split() for row in out.splitlines()[1:]] == [[name, "not", "run"] for name in FIRST.claims]
    assert "is not a folder, so there are no stored results yet." in err
    main(["reproduce", "1-scope", "--edition", "first", "--budget", "0", "--results", str(tmp_path / "new"), "--json"])
    assert {one["verdict"] for one in json.loads(capsys.readouterr().out)} == {"not run"}
    finding = findings([CLAIM], Results(tmp_path / "new"))[0]
    assert verdict_text(finding) == "not run"
    assert verdict_text(replace(finding, diverged=1)) == "undecided, as runs diverged"
