"""The second stage of a frontier chooses a learning rate by the same rule, and claims take it with the value."""

import pytest
from claim_runs import Quiet, store
from editions import copy_of_first

from equipoise.errors import EquipoiseError
from equipoise_lab.cli.parser import parse
from equipoise_lab.reproduce import edition as editions
from equipoise_lab.reproduce.arms import Choice, fill, needs
from equipoise_lab.reproduce.command import reproduce
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.edition import load_edition
from equipoise_lab.reproduce.frontier import parse_frontiers
from equipoise_lab.reproduce.page import pages
from equipoise_lab.reproduce.page.wording import options_text
from equipoise_lab.reproduce.results import Results
from equipoise_lab.train.loop import check

SIZES = {"small": {"steps": 80, "learning_rate": 3e-3}}
CONTENT = {
    "common": {"size": "small", "seeds": [100, 101], "most_maxvio": 1.5, "most_widenings": 2},
    "frontiers": {
        "f": {"strategy": "lbl:coefficient={}", "score_function": "softmax", "values": [0.01, 0.03, 0.1]},
        "g": {"strategy": "quantile"},
        "h": {"strategy": "loss-free:rate={}", "values": [0.01]},
    },
    "learning_rates": {"frontiers": ["f", "g"], "values": [6e-3, 1.5e-3, 3e-3], "most_widenings": 1},
}
F, G, H = parse_frontiers(CONTENT, SIZES).values()


def _store(results, job, nats=5.0, maxvio=1.0):
    figures = {"selection_nats": nats, "selection_maxvio": maxvio, "val_nats": nats, "maxvio_global": maxvio}
    store(results, job, result=figures)


def _fill_values(results, frontier=F):
    """At the learning rate of the size, 0.003, the middle one of three values is best."""
    for job in frontier.jobs(results):
        _store(results, job, 5.0 if "0.03" in dict(job.options)["strategy"] else 9.0)


def _fill_rates(results, nats, maxvio=None, frontier=F):
    for learning_rate, mean in nats.items():
        for seed, deviation in zip(frontier.seeds, (-0.5, 0.5), strict=True):
            job = frontier.job(frontier.value(results), seed, learning_rate)
            _store(results, job, mean + deviation, (maxvio or {}).get(learning_rate, 1.0))


def _rates(jobs):
    return {(dict(job.options)["strategy"], dict(job.options)["learning_rate"]) for job in jobs}


def test_learning_rates_are_tried_at_the_chosen_value_once_it_is_known(tmp_path):
    results = Results(tmp_path)
    assert _rates(F.jobs(results)) == {(f"lbl:coefficient={value}", 3e-3) for value in ("0.01", "0.03", "0.1")}
    assert F.learning_rate_grid(results) == [] and F.learning_rate(results) is None and F.chosen(results) is None
    _fill_values(results)
    assert F.value(results) == "0.03" and F.chosen(results) is None
    assert F.learning_rate_grid(results) == ["0.0015", "0.003", "0.006"]
    missing = results.missing(F.jobs(results))
    assert (
        _rates(missing) == {("lbl:coefficient=0.03", 1.5e-3), ("lbl:coefficient=0.03", 6e-3)} and len(missing) == 4
    ), "the runs at the learning rate of the size are those of the first stage"


def test_the_rule_of_choice_is_that_of_values(tmp_path):
    results = Results(tmp_path / "lowest")
    _fill_values(results)
    _fill_rates(results, {"0.0015": 5.2, "0.006": 5.1})
    assert F.learning_rate(results) == "0.003" and not F.learning_rate_at_edge(results)
    assert F.chosen(results) == Choice(
        "0.03", {"strategy": "lbl:coefficient=0.03", "score_function": "softmax", "learning_rate": 0.003}
    )
    results = Results(tmp_path / "unbalanced")
    _fill_values(results)
    _fill_rates(results, {"0.0015": 4.9, "0.006": 5.1}, {"0.0015": 1.6})
    assert F.learning_rate(results) == "0.003"


def test_a_grid_of_learning_rates_is_widened_by_its_ratio_up_to_a_limit(tmp_path):
    up = Results(tmp_path / "up")
    _fill_values(up)
    _fill_rates(up, {"0.0015": 5.2, "0.006": 4.9})
    assert F.learning_rate_grid(up)[-1] == "0.012" and F.learning_rate(up) is None
    _fill_rates(up, {"0.012": 4.8})
    assert F.learning_rate_grid(up)[-1] == "0.012" and F.learning_rate(up) == "0.012"  # at most one widening
    assert F.learning_rate_at_edge(up)
    down = Results(tmp_path / "down")
    _fill_values(down)
    _fill_rates(down, {"0.0015": 4.9, "0.006": 5.1, "0.00075": 5.0})
    assert F.learning_rate_grid(down)[0] == "0.00075" and F.learning_rate(down) == "0.0015"


def test_a_mechanism_without_a_number_has_a_learning_rate_too_and_one_that_is_not_listed_has_none(tmp_path):
    results = Results(tmp_path)
    for job in [*G.jobs(results), *H.jobs(results)]:
        _store(results, job)
    assert {dict(job.options)["learning_rate"] for job in G.jobs(results)} == {1.5e-3, 3e-3, 6e-3}
    _fill_rates(results, {"0.0015": 5.2, "0.003": 5.1, "0.006": 5.0, "0.012": 5.1}, frontier=G)
    assert G.chosen(results) == Choice("", {"strategy": "quantile", "learning_rate": 0.006})
    while missing := results.missing(H.jobs(results)):
        for job in missing:
            _store(results, job, float(dict(job.options)["strategy"].split("=")[1]))
    assert H.learning_rates is None and H.learning_rate_grid(results) == []
    assert "learning_rate" not in H.chosen(results).options


def test_an_arm_takes_all_of_a_choice_or_parts_of_it():
    chosen = {"f": Choice("0.03", {"strategy": "lbl:coefficient=0.03", "gate": "x", "learning_rate": 0.006}), "g": None}
    assert fill({"frontier": "f"}, chosen) == chosen["f"].options
    assert fill({"frontier": "f", "learning_rate": 0.001, "steps": 9}, chosen) == {
        "strategy": "lbl:coefficient=0.03",
        "gate": "x",
        "learning_rate": 0.001,
        "steps": 9,
    }
    parts = {"strategy": "quantile+lbl:coefficient={f/10}", "learning_rate": "{f.learning_rate}"}
    assert fill(parts, chosen) == {"strategy": "quantile+lbl:coefficient=0.003", "learning_rate": 0.006}
    assert fill({"strategy": "none", "learning_rate": "{f.learning_rate/2}"}, chosen)["learning_rate"] == 0.003
    assert fill({"strategy": "none", "learning_rate": "{f.learning_rate*2}"}, chosen)["learning_rate"] == 0.012
    for arm in ({"frontier": "g"}, {"strategy": "a={g}"}, {"strategy": "a", "learning_rate": "{g.learning_rate/2}"}):
        assert fill(arm, chosen) == arm and {need.frontier for need in needs(arm)} == {"g"}
    assert [need.what for need in needs({"frontier": "f", "then": "lbl:coefficient={g}"})] == ["all", "value"]
    assert list(needs(fill(parts, chosen))) == []


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"frontiers": ["f"], "values": [3e-3]}, "must have frontiers, values and most_widenings: got frontiers, val"),
        ({"frontiers": ["x"]}, r"must name frontiers of the file \(f, g, h\): got 'x'"),
        ({"values": [3e-3]}, "must have at least two values: got"),
        ({"values": [1e-3, 2e-3]}, "must hold the learning_rate that size small names, .*: got .* and 0.003"),
    ],
)
def test_a_wrong_second_stage_is_refused(stage, message):
    if "most_widenings" not in stage and len(stage) == 1:
        stage = CONTENT["learning_rates"] | stage
    with pytest.raises(EquipoiseError, match=message):
        parse_frontiers(CONTENT | {"learning_rates": stage}, SIZES)


def test_a_second_stage_needs_a_size_that_names_its_learning_rate_and_arms_that_do_not():
    with pytest.raises(EquipoiseError, match="must hold the learning_rate that size small names, .*: got .* and None"):
        parse_frontiers(CONTENT, {"small": {"steps": 80}})
    arms = {**CONTENT["frontiers"], "g": {"strategy": "quantile", "learning_rate": 1e-3}}
    with pytest.raises(EquipoiseError, match="frontier g: a frontier of learning_rates must not set learning_rate"):
        parse_frontiers(CONTENT | {"frontiers": arms}, SIZES)


FRONTIERS = """
[common]
size = "small"
seeds = [100, 101]
most_maxvio = 1.5
most_widenings = 1
[frontiers.micro]
strategy = "lbl:scope=micro_batch,coefficient={}"
values = [0.003, 0.01, 0.03]
[frontiers.global]
strategy = "lbl:scope=global_batch,coefficient={}"
values = [0.003, 0.01, 0.03]
[learning_rates]
frontiers = ["global", "micro"]
values = [1.5e-3, 3e-3, 6e-3]
most_widenings = 1
"""


def test_a_claim_runs_each_mechanism_at_its_own_learning_rate(tmp_path, monkeypatch):
    """With a stand-in for the runs: micro is best at 0.006, beyond that at 0.012; global at 0.0015 is not the edge."""
    folder = tmp_path / "editions" / "first"
    copy_of_first(folder)
    (folder / "frontiers.toml").write_text(FRONTIERS)
    (folder / "sizes.toml").write_text((folder / "sizes.toml").read_text() + "learning_rate = 3e-3\n")
    sizes = (folder / "sizes.toml").read_text().replace("[small]", "[small]\nlearning_rate = 3e-3")
    (folder / "sizes.toml").write_text(sizes)
    claim = folder / "claims" / "1-scope.toml"
    arm = 'strategy = "lbl:scope=micro_batch,coefficient={micro}"'
    assert arm in claim.read_text()
    claim.write_text(claim.read_text().replace(arm, 'frontier = "micro"'))
    monkeypatch.setattr(editions, "EDITIONS", tmp_path / "editions")
    executed = []

    def execute(jobs, results, work, progress, *, workers, minutes):
        for job in results.missing(jobs):
            options = dict(job.options)
            executed.append(options)
            best = 0.006 if "micro" in options["strategy"] else 0.003
            coefficient = float(options["strategy"].split("coefficient=")[1])
            _store(results, job, 5 + abs(options["learning_rate"] - best) + abs(coefficient - 0.01))
        return True

    monkeypatch.setattr("equipoise_lab.reproduce.command.execute", execute)
    options = Reproduce("1-scope", "first", out=tmp_path / "w", results=tmp_path / "r")
    reported = reproduce(options, Quiet())
    of_claim = [options for options in executed if options["seed"] < 100]
    assert {(options["strategy"], options["learning_rate"], options["steps"]) for options in of_claim} == {
        ("lbl:scope=micro_batch,coefficient=0.01", 0.006, 200),
        ("lbl:scope=global_batch,coefficient=0.01", 0.003, 200),
    }
    assert len(of_claim) == 16 and of_claim == executed[-16:] and reported[0].estimate.n == 8
    at_rates = [options for options in executed if options["seed"] == 100]
    assert len(at_rates) == 2 * 3 + 2 + 3, "three values, two more learning rates, one beyond the edge for micro"
    for each in (of_claim[0], of_claim[1], at_rates[-1]):
        arguments = [str(item) for name, value in each.items() if name != "qk_norm"
                     for item in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
        check(parse(["train", "--out", str(tmp_path / "run"), "--no-save-model", *arguments]))
    edition = load_edition("first")
    results = edition.results(tmp_path / "r")
    text = pages("p.md", edition, edition.claims_with_values(results), reported, results)["p_runs.md"]
    assert (
        "| micro | `--strategy lbl:scope=micro_batch,coefficient=0.01` | 0.0015: 5.005 / 1.000, 0.003: 5.003 / 1.000, "
        in text
    )
    assert "**0.006: 5.000 / 1.000**, 0.012: 5.006 / 1.000 |" in text
    assert (
        "| global | `--strategy lbl:scope=global_batch,coefficient=0.01` | 0.0015: 5.002 / 1.000, **0.003: 5.000"
        in text
    )
    assert "the same rule chooses one" in text


def test_a_page_says_what_an_arm_still_needs():
    assert options_text({"frontier": "f"}) == "what frontier f will choose"
    assert options_text({"frontier": "f", "steps": 9}) == "what frontier f will choose `--steps 9`"
    assert options_text({"strategy": "none", "qk_norm": False}) == "`--strategy none --no-qk-norm`"


def test_an_edition_without_a_second_stage_says_nothing_of_learning_rates(tmp_path):
    edition = load_edition("first")
    text = pages("p.md", edition, edition.claims_with_values(Results(tmp_path)), [], Results(tmp_path))["p_runs.md"]
    assert "each learning rate" not in text


@pytest.mark.parametrize(("name", "seeds"), [("first", "with seeds 100 and 101. "), ("second", "with seed 310. ")])
def test_a_page_names_the_seeds_of_the_frontiers(tmp_path, name, seeds):
    edition = load_edition(name)
    text = pages("p.md", edition, edition.claims_with_values(Results(tmp_path)), [], Results(tmp_path))["p_runs.md"]
    assert seeds in text
