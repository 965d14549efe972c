"""Claims are whole, and can be run: every arm is one that `equipoise train` takes."""

import dataclasses
import shlex

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cli import _parse
from equipoise_lab.reproduce.claim import SIZES, Comparison, claim_names, load_claim, parse_claim
from equipoise_lab.reproduce.frontier import FRONTIERS
from equipoise_lab.train.config import Train
from equipoise_lab.train.loop import check

GOOD = {
    "title": "a is lower than b",
    "source": "somewhere",
    "paper": "a 1, b 2",
    "size": "small",
    "seeds": 2,
    "arms": {"a": {"strategy": "none"}, "b": {"strategy": "loss-free"}},
    "primary": {"statistic": "val_nats", "of": "a", "against": "b", "claim": "lower"},
}


@pytest.mark.parametrize("name", claim_names())
def test_every_arm_of_a_claim_is_a_run_that_can_be_asked_for(name, tmp_path):
    claim = load_claim(name).with_values(dict.fromkeys(FRONTIERS, "0.02"))
    assert claim.title and claim.source and claim.paper and claim.seeds >= 3
    assert len({options["strategy"] + str(options) for options in claim.arms.values()}) == len(claim.arms)
    for arm in claim.arms:
        job = claim.job(arm, 1)
        asked = _parse(["train", "--out", str(tmp_path / arm), "--no-save-model", *job.arguments])
        assert isinstance(asked, Train) and asked.seed == 1
        for option, value in job.options:
            assert str(getattr(asked, option)) == str(value), option
        check(asked)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_leaves_out_what_arms_and_seeds_decide(size):
    assert {"strategy", "seed", "out", "resume", "save_model"}.isdisjoint(SIZES[size])
    assert set(SIZES[size]) <= {field.name for field in dataclasses.fields(Train)}


def test_a_seed_is_done_before_the_next_one():
    claim = parse_claim("x", GOOD)
    assert [(dict(job.options)["seed"], dict(job.options)["strategy"]) for job in claim.jobs()] == [
        (0, "none"),
        (0, "loss-free"),
        (1, "none"),
        (1, "loss-free"),
    ]
    assert shlex.join(claim.job("a", 1).arguments).endswith("--seed 1 --steps 80 --strategy none")


def test_an_arm_may_have_fewer_seeds_than_its_claim():
    arms = GOOD["arms"] | {"c": {"strategy": "quantile", "seeds": 2}}
    claim = parse_claim("x", GOOD | {"seeds": 3, "first_seed": 5, "arms": arms})
    assert claim.arms["c"] == {"strategy": "quantile"}  # nothing that a run is given
    assert [dict(job.options)["seed"] for job in claim.jobs()] == [5, 5, 5, 6, 6, 6, 7, 7]
    assert claim.seeds_for(claim.primary) == 3
    assert claim.seeds_for(Comparison("val_nats", "lower", "a", "c")) == 2


@pytest.mark.parametrize("seeds", [1, 3, 2.0, "2"])
def test_fewer_seeds_of_an_arm_are_fewer_and_some(seeds):
    arms = {"a": {"strategy": "none"}, "b": {"strategy": "loss-free", "seeds": seeds}}
    with pytest.raises(EquipoiseError, match="seeds of arm b must be a whole number from 2, less than the 3"):
        parse_claim("x", GOOD | {"seeds": 3, "arms": arms})


@pytest.mark.parametrize("name", claim_names())
def test_a_verdict_on_a_loss_has_eight_seeds_and_others_three(name):
    claim = load_claim(name)
    assert claim.seeds_for(claim.primary) >= (8 if "nats" in claim.primary.statistic else 3)


def test_what_a_comparison_is_called():
    assert str(Comparison("val_nats", "lower", "a", "b")) == "val_nats, a − b"
    assert str(Comparison("val_nats", "lower", over={"a": 1, "b": 2})) == "val_nats over 1, 2"


def test_a_claim_has_the_precision_of_its_size_or_its_own():
    def precisions(**own):
        return {dict(job.options)["dtype"] for job in parse_claim("x", {**GOOD, **own}).jobs()}

    assert precisions() == {"bfloat16"} and precisions(dtype="float32") == {"float32"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": "huge"}, "size must be one of small, standard: got 'huge'"),
        ({"seeds": 1}, "seeds must be a whole number from 2: got 1"),
        ({"arms": {"a": {}, "b": {"strategy": "none"}}}, "arm a must have a strategy"),
        ({"primary": {**GOOD["primary"], "of": "c"}}, "must be of its arms a, b: got 'c'"),
        ({"primary": {**GOOD["primary"], "claim": "better"}}, "claim must be lower, higher or equal: got 'better'"),
        (
            {"primary": {**GOOD["primary"], "claim": "equal", "statistic": "maxvio_global"}},
            "maxvio_global, a − b must have a margin: only losses",
        ),
        ({"primary": {**GOOD["primary"], "margin": 1}}, "margin is nothing that a claim has"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32: got 'float16'"),
        ({"colour": "red"}, "colour is nothing that a claim has"),
    ],
)
def test_a_claim_that_is_not_whole_is_refused(change, words):
    with pytest.raises(EquipoiseError, match=words):
        parse_claim("x", {**GOOD, **change})


def test_a_claim_that_is_missing_something_or_not_there_is_refused():
    with pytest.raises(EquipoiseError, match="claim x: paper must be there"):
        parse_claim("x", {name: value for name, value in GOOD.items() if name != "paper"})
    with pytest.raises(UsageError, match="CLAIM must be all or one of 1-scope"):
        load_claim("9-nothing")
