"""Claims are complete, and every arm is a valid call of `equipoise train`."""

import dataclasses
import shlex

import pytest

from equipoise.errors import EquipoiseError
from equipoise_lab.cli.parser import parse
from equipoise_lab.reproduce.arms import Choice
from equipoise_lab.reproduce.claim import Comparison, parse_claim
from equipoise_lab.reproduce.edition import edition_names, load_edition
from equipoise_lab.train.config import Train
from equipoise_lab.train.loop import check

EDITIONS = [load_edition(name) for name in edition_names()]
CLAIMS = [claim for edition in EDITIONS for claim in edition.claims.values()]
SIZES = load_edition("first").sizes
every_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.edition}-{claim.name}")

GOOD = {
    "title": "a is lower than b",
    "source": "somewhere",
    "paper": "a 1, b 2",
    "size": "small",
    "seeds": 2,
    "arms": {"a": {"strategy": "none"}, "b": {"strategy": "loss-free"}},
    "primary": {"statistic": "val_nats", "of": "a", "against": "b", "claim": "lower"},
}


def _parse(content):
    return parse_claim("x", content, SIZES, "first")


def _stand_in(frontier):
    """A choice of a frontier without its runs."""
    value = "0.02" if frontier.values else ""
    return Choice(value, frontier.options(value, None if frontier.learning_rates is None else "0.002"))


@every_claim
def test_every_arm_of_a_claim_is_a_valid_run(claim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/second_text").mkdir(parents=True)  # benchmarks/second_text.py makes it
    frontiers = load_edition(claim.edition).frontiers
    claim = claim.with_values({name: _stand_in(frontier) for name, frontier in frontiers.items()})
    assert claim.title and claim.source and claim.paper and claim.seeds >= 3
    assert len({options["strategy"] + str(options) for options in claim.arms.values()}) == len(claim.arms)
    for arm in claim.arms:
        job = claim.job(arm, 1)
        options = parse(["train", "--out", str(tmp_path / arm), "--no-save-model", *job.arguments])
        assert isinstance(options, Train) and options.seed == 1
        for option, value in job.options:
            assert str(getattr(options, option)) == str(value), option
        check(options)


@pytest.mark.parametrize("edition", EDITIONS, ids=lambda edition: edition.name)
def test_a_size_sets_no_option_that_arms_or_seeds_decide(edition):
    for size in edition.sizes.values():
        assert {"strategy", "seed", "out", "resume", "save_model"}.isdisjoint(size)
        assert set(size) <= {field.name for field in dataclasses.fields(Train)}


def test_all_arms_of_a_seed_come_before_the_next_seed():
    claim = _parse(GOOD)
    assert [(dict(job.options)["seed"], dict(job.options)["strategy"]) for job in claim.jobs()] == [
        (0, "none"),
        (0, "loss-free"),
        (1, "none"),
        (1, "loss-free"),
    ]
    assert shlex.join(claim.job("a", 1).arguments).endswith("--seed 1 --steps 80 --strategy none")


def test_an_arm_may_have_fewer_seeds_than_its_claim():
    arms = GOOD["arms"] | {"c": {"strategy": "quantile", "seeds": 2}}
    claim = _parse(GOOD | {"seeds": 3, "first_seed": 5, "arms": arms})
    assert claim.arms["c"] == {"strategy": "quantile"}  # seeds is no option of a run
    assert [dict(job.options)["seed"] for job in claim.jobs()] == [5, 5, 5, 6, 6, 6, 7, 7]
    assert claim.seeds_for(claim.primary) == 3
    assert claim.seeds_for(Comparison("val_nats", "lower", "a", "c")) == 2


@pytest.mark.parametrize("seeds", [1, 3, 2.0, "2"])
def test_an_arm_has_at_least_two_and_fewer_seeds_than_its_claim(seeds):
    arms = {"a": {"strategy": "none"}, "b": {"strategy": "loss-free", "seeds": seeds}}
    with pytest.raises(
        EquipoiseError, match="seeds of arm b must be a whole number of at least 2 and below the 3 of the claim"
    ):
        _parse(GOOD | {"seeds": 3, "arms": arms})


@every_claim
def test_a_verdict_on_a_loss_has_at_least_eight_seeds_and_others_three(claim):
    is_affordable = claim.size != "long"
    assert claim.seeds_for(claim.primary) >= (8 if "nats" in claim.primary.statistic and is_affordable else 3)


def test_a_comparison_as_text():
    assert str(Comparison("val_nats", "lower", "a", "b")) == "val_nats, a − b"
    assert str(Comparison("val_nats", "lower", over={"a": 1, "b": 2})) == "val_nats over 1, 2"


def test_a_claim_runs_in_the_precision_of_its_size_or_its_own():
    def precisions(**extra):
        return {dict(job.options)["dtype"] for job in _parse({**GOOD, **extra}).jobs()}

    assert precisions() == {"bfloat16"} and precisions(dtype="float32") == {"float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "huge"}, "size must be one of small, standard: got 'huge'"),
        ({"seeds": 1}, "seeds must be a whole number of at least 2, or several that rise: got 1"),
        ({"seeds": [8, 8]}, r"or several that rise: got \[8, 8\]"),
        ({"seeds": []}, r"or several that rise: got \[\]"),
        (
            {"arms": {"a": {}, "b": {"strategy": "none"}}},
            "arm a must have either a strategy or a frontier: it has no option",
        ),
        ({"primary": {**GOOD["primary"], "of": "c"}}, r"must name arms of the claim \(a, b\): got 'c'"),
        ({"primary": {**GOOD["primary"], "claim": "better"}}, "claim must be lower, higher or equal: got 'better'"),
        (
            {"primary": {**GOOD["primary"], "claim": "equal", "statistic": "maxvio_global"}},
            "maxvio_global, a − b must have a margin: only losses",
        ),
        ({"primary": {**GOOD["primary"], "margin": 1}}, "unknown keys: margin. Remove them"),
        (
            {"arms": {"a": {"strategy": "none", "frontier": "f"}, "b": {"strategy": "none"}}},
            "arm a must have either a strategy or a frontier: it has strategy, frontier",
        ),
        ({"primary": {**GOOD["primary"], "effect": "0.1"}}, "effect must be a number: got '0.1'"),
        ({"primary": {**GOOD["primary"], "statistic": "val_nat"}}, "statistic must be one of .*: got val_nat"),
        ({"primary": {**GOOD["primary"], "claim": "equal", "margin": 0}}, "margin must be above 0: got 0"),
        (
            {"primary": {"statistic": "val_nats", "claim": "equal", "over": {"a": 1, "b": 2}}},
            "must claim lower or higher, over numbers that differ: got equal",
        ),
        (
            {"primary": {"statistic": "val_nats", "claim": "lower", "over": {"a": 1, "b": 1}}},
            "over numbers that differ: got lower over {'a': 1, 'b': 1}",
        ),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32: got 'float16'"),
        ({"colour": "red"}, "unknown keys: colour. Remove them"),
    ],
)
def test_a_wrong_value_in_a_claim_is_refused(change, message):
    with pytest.raises(EquipoiseError, match=message):
        _parse({**GOOD, **change})


def test_an_incomplete_claim_is_refused():
    with pytest.raises(EquipoiseError, match="claim x: required keys are missing: paper"):
        _parse({name: value for name, value in GOOD.items() if name != "paper"})
