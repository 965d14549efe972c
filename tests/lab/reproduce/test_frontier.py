"""Which value a frontier chooses, when its grid is widened, and how claims use the value."""

import dataclasses

import pytest
from claim_runs import ANY, FIRST, Quiet, store

from equipoise_lab.cli.parser import parse
from equipoise_lab.reproduce.arms import Choice
from equipoise_lab.reproduce.claim import parse_claim
from equipoise_lab.reproduce.command import reproduce
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.edition import edition_names, load_edition
from equipoise_lab.reproduce.frontier import Frontier
from equipoise_lab.reproduce.page import pages
from equipoise_lab.reproduce.page.evidence import _cells
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import findings
from equipoise_lab.train.loop import check

EDITIONS = [load_edition(name) for name in edition_names()]
FRONTIERS = [frontier for edition in EDITIONS for frontier in edition.frontiers.values()]
FRONTIER = Frontier(
    name="f",
    arm={"strategy": "lbl:coefficient={}"},
    values=(0.01, 0.1, 0.03),
    size="small",
    shared=FIRST.sizes["small"],
    seeds=(100, 101),
    most_maxvio=1.5,
    most_widenings=2,
)


def _store(results, job, **result):
    store(results, job, result=result, seconds=60.0)


def _fill(results, nats, maxvio=1.0, frontier=FRONTIER):
    """Stores the runs of each value; ``nats`` are mean selection losses, and seeds differ by 0.5 either way."""
    for value, mean in nats.items():
        for seed, deviation in zip(frontier.seeds, (-0.5, 0.5), strict=True):
            balance = maxvio[value] if isinstance(maxvio, dict) else maxvio
            _store(results, frontier.job(value, seed), selection_nats=mean + deviation, selection_maxvio=balance)


def test_the_value_with_the_lowest_loss_is_chosen(tmp_path):
    results = Results(tmp_path)
    _fill(results, {"0.01": 5.2, "0.03": 5.0, "0.1": 5.1})
    assert FRONTIER.value(results) == "0.03" and not FRONTIER.at_edge(results)
    assert FRONTIER.grid(results) == ["0.01", "0.03", "0.1"]
    assert FRONTIER.point("0.03", results).mean("selection_nats") == pytest.approx(5.0)


def test_a_value_at_which_a_run_diverges_is_not_chosen_and_is_marked(tmp_path):
    results = Results(tmp_path)
    _fill(results, {"0.01": 5.2, "0.03": 5.0, "0.1": 4.9})
    _store(results, FRONTIER.job("0.1", 101), diverged=12)
    assert FRONTIER.value(results) == "0.03" and FRONTIER.grid(results)[-1] == "0.1"
    assert list(_cells(FRONTIER, results)) == ["0.01: 5.200 / 1.000", "**0.03: 5.000 / 1.000**", "0.1: diverged"]


def test_a_value_out_of_balance_is_chosen_only_if_all_are(tmp_path):
    results = Results(tmp_path)
    _fill(results, {"0.01": 4.0, "0.03": 5.0, "0.1": 5.1}, {"0.01": 1.6, "0.03": 1.5, "0.1": 0.2})
    assert FRONTIER.value(results) == "0.03" and FRONTIER.refused_for_balance(results) == ["0.01"]
    assert next(_cells(FRONTIER, results)) == "0.01: 4.000 / 1.600 (refused)"
    results = Results(tmp_path / "all")
    _fill(results, {"0.01": 4.0, "0.03": 5.0, "0.1": 4.5}, {"0.01": 1.9, "0.03": 1.6, "0.1": 1.7})
    assert FRONTIER.value(results) == "0.03"


def test_nothing_is_chosen_while_a_run_is_missing(tmp_path):
    results = Results(tmp_path)
    _fill(results, {"0.01": 5.2, "0.03": 5.0})
    _store(results, FRONTIER.job("0.1", 100), selection_nats=1.0, selection_maxvio=0.1)
    assert FRONTIER.value(results) is None and FRONTIER.point("0.1", results) is None
    assert FRONTIER.grid(results) == ["0.01", "0.03", "0.1"]


def test_a_grid_grows_at_the_edge_that_holds_the_best_value_up_to_a_limit(tmp_path):
    results = Results(tmp_path)
    _fill(results, {"0.01": 5.2, "0.03": 5.0, "0.1": 4.9})
    assert FRONTIER.grid(results)[-1] == "0.3" and FRONTIER.value(results) is None
    assert [dict(job.options)["strategy"] for job in results.missing(FRONTIER.jobs(results))] == [
        "lbl:coefficient=0.3"
    ] * 2
    _fill(results, {"0.3": 4.8})
    assert FRONTIER.grid(results)[-1] == "1"
    _fill(results, {"1": 4.7})
    assert FRONTIER.grid(results)[-1] == "1"  # at most two widenings
    assert FRONTIER.value(results) == "1" and FRONTIER.at_edge(results)
    down = Results(tmp_path / "down")
    _fill(down, {"0.01": 4.9, "0.03": 5.0, "0.1": 5.1, "0.003": 5.0})
    assert FRONTIER.grid(down) == ["0.003", "0.01", "0.03", "0.1"] and FRONTIER.value(down) == "0.01"


def test_a_mechanism_without_a_number_has_one_point(tmp_path):
    alone = dataclasses.replace(FRONTIER, arm={"strategy": "quantile"}, values=())
    results = Results(tmp_path)
    assert alone.grid(results) == [""] and alone.value(results) is None
    _fill(results, {"": 5.0}, frontier=alone)
    assert alone.value(results) == "" and not alone.at_edge(results)
    assert {dict(job.options)["strategy"] for job in alone.jobs(results)} == {"quantile"}


@pytest.mark.parametrize("frontier", FRONTIERS, ids=lambda frontier: frontier.name)
def test_every_point_of_a_frontier_is_a_valid_run(frontier, tmp_path):
    jobs = frontier.jobs(Results(tmp_path))
    assert len(set(jobs)) == len(frontier.seeds) * max(1, len(frontier.values))
    for job in jobs[: len(jobs) // 2]:
        check(parse(["train", "--out", str(tmp_path / "run"), "--no-save-model", *job.arguments]))


@pytest.mark.parametrize("edition", EDITIONS, ids=lambda edition: edition.name)
def test_all_frontiers_of_an_edition_are_tuned_alike(edition):
    frontiers = edition.frontiers.values()
    assert len({(each.size, each.seeds, each.most_maxvio, each.most_widenings) for each in frontiers}) == 1
    for kind in ("lbl:", "loss-free:"):
        grids = {frontier.values for frontier in frontiers if frontier.arm["strategy"].startswith(kind)}
        assert len(grids) == 1, "all mechanisms of a kind must have the same grid"


def test_a_claim_takes_the_chosen_values_and_has_no_runs_before(tmp_path):
    content = {
        "title": "t", "source": "s", "paper": "p", "size": "small", "seeds": 2,
        "arms": {
            "a": {"strategy": "lbl:coefficient={f}+lbl:scope=sequence,coefficient={f/100}", "qk_norm": False},
            "b": {"strategy": "loss-free", "then": "lbl:coefficient={g}", "switch_at": 3},
        },
        "primary": {"statistic": "val_nats", "of": "a", "against": "b", "claim": "lower"},
    }  # fmt: skip
    claim = parse_claim("x", content, FIRST.sizes, "first")
    assert claim.frontiers == ["f", "g"] and claim.jobs() == []
    half = claim.with_values({"f": Choice("0.03", {}), "g": None})
    assert half.frontiers == ["g"] and half.jobs() == []
    whole = half.with_values({"g": Choice("0.1", {})})
    assert whole.frontiers == [] and len(whole.jobs()) == 4
    assert whole.arms["a"] == {
        "strategy": "lbl:coefficient=0.03+lbl:scope=sequence,coefficient=0.0003",
        "qk_norm": False,
    }
    assert whole.arms["b"]["then"] == "lbl:coefficient=0.1"


def test_a_claim_runs_after_its_frontiers_with_the_values_that_they_chose(tmp_path, monkeypatch):
    """With a stand-in for the runs: the loss is lowest at coefficient 0.3, beyond the grid."""
    executed = []

    def execute(jobs, results, work, progress, *, workers, minutes):
        for job in results.missing(jobs):
            strategy = dict(job.options)["strategy"]
            executed.append((strategy, dict(job.options)["seed"]))
            coefficient = float(strategy.split("coefficient=")[1].split(",")[0])
            nats = 5 + abs(coefficient - 0.3)
            _store(results, job, selection_nats=nats, selection_maxvio=1.0, val_nats=nats, maxvio_global=1.0)
        return True

    monkeypatch.setattr("equipoise_lab.reproduce.command.execute", execute)
    findings = reproduce(Reproduce("1-scope", "first", out=tmp_path / "w", results=tmp_path / "r"), Quiet())
    of_claim = [(strategy, seed) for strategy, seed in executed if seed < 100]
    assert {strategy for strategy, _ in of_claim} == {
        "lbl:scope=micro_batch,coefficient=0.3",
        "lbl:scope=global_batch,coefficient=0.3",
    }
    assert len(of_claim) == 16 and of_claim == executed[-16:]
    assert findings[0].estimate.n == 8 and findings[0].estimate.mean == 0


def test_a_claim_out_of_time_says_that_runs_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise_lab.reproduce.command.execute", lambda *a, **b: False)
    progress = Quiet()
    reproduce(Reproduce("1-scope", "first", budget=1, out=tmp_path / "w", results=tmp_path / "r"), progress)
    assert progress.lines[-1] == "runs are missing for 1-scope; run the same command again to continue"


def _claim(name, claim, **extra):
    content = {
        "title": "t", "source": "s", "paper": "p", "size": "small", "seeds": 4,
        "arms": {"a": {"strategy": "none"}, "b": {"strategy": name if name != "1-scope" else "quantile"}},
        "primary": {"statistic": "val_nats", "of": "b", "against": "a", "claim": claim, **extra},
    }  # fmt: skip
    return parse_claim(name, content, FIRST.sizes, "first")


@pytest.mark.parametrize(
    ("first", "margin", "verdict"),
    [(-0.3, 0.1, "supported"), (-0.03, 0.01, "undecided"), (0.3, None, "undecided"), (None, None, "undecided")],
)
def test_the_margin_of_equality_is_a_third_of_the_difference_between_scopes(tmp_path, first, margin, verdict):
    scope, same = _claim("1-scope", "lower"), _claim("loss-free", "equal")
    results = Results(tmp_path)
    for seed in range(4):
        noise = (0.004, -0.004, 0.003, -0.003)[seed]
        _store(results, same.job("a", seed), val_nats=5.0)
        _store(results, same.job("b", seed), val_nats=5.01 + noise)
        if first is not None:
            _store(results, scope.job("b", seed), val_nats=5.0 + first + noise)
    finding = findings([scope, same], results)[1]
    assert finding.margin == (None if margin is None else pytest.approx(margin))
    assert finding.verdict == verdict
    assert finding.estimate.n == 4  # results are shown even without a margin
    text = "\n".join(pages("page.md", ANY, [scope, same], findings([scope, same], results), results).values())
    assert f"equal, ± {margin:.4f}" in text if margin else "not known yet" in text


def test_a_statistic_may_be_a_difference_of_two(tmp_path):
    claim = _claim("loss-free", "higher")
    claim = dataclasses.replace(claim, primary=dataclasses.replace(claim.primary, statistic="val_nats - train_nats"))
    results = Results(tmp_path)
    for seed in range(3):
        _store(results, claim.job("a", seed), val_nats=5.0, train_nats=4.0)
        _store(results, claim.job("b", seed), val_nats=5.0, train_nats=3.0 + seed / 10)
    _store(results, claim.job("b", 3), val_nats=5.0)
    (finding,) = findings([claim], results)
    assert finding.means["a"] == pytest.approx(1.0) and finding.means["b"] == pytest.approx(1.9)
    assert finding.estimate.n == 3
