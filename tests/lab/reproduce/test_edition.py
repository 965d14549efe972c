"""Editions have nothing in common: neither results, nor runs in progress, nor a family of verdicts, nor a table."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from claim_runs import Quiet, store
from editions import copy_of_first

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.cli import main
from equipoise_lab.records import read_json
from equipoise_lab.reproduce import edition as editions
from equipoise_lab.reproduce.command import as_json, reproduce
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.edition import DEFAULT, edition_names, load_edition
from equipoise_lab.reproduce.jobs import Job, key_of
from equipoise_lab.reproduce.page import pages
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import findings

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "claims"


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A first and a second edition with the same claim, whose arms have the same options."""
    for name in ("first", "second"):
        copy_of_first(tmp_path / "editions" / name)
    monkeypatch.setattr(editions, "EDITIONS", tmp_path / "editions")
    return load_edition("first"), load_edition("second")


def _store(results, job, nats=5.0, **more):
    figures = {"val_nats": nats, "maxvio_global": 1.0, "selection_nats": nats, "selection_maxvio": 1.0}
    store(results, job, result=figures, **{"recipe": results.recipe, **more})


def _fill(edition, results, difference):
    """Stores the runs of all frontiers and of claim 1-scope."""
    for frontier in edition.frontiers.values():
        while missing := results.missing(frontier.jobs(results)):
            for job in missing:
                _store(results, job)
    claim = edition.claims["1-scope"].with_values(edition.chosen(results))
    for seed in claim.all_seeds:
        _store(results, claim.job("micro", seed), 5.0)
        _store(results, claim.job("global", seed), 5.0 + difference + seed / 1000)


def test_the_jobs_of_the_first_edition_are_those_of_its_454_results():
    edition = load_edition("first")
    results = edition.results(RESULTS)
    jobs = [job for claim in edition.claims_with_values(results) for job in claim.jobs()]
    jobs += [job for frontier in edition.frontiers.values() for job in frontier.jobs(results)]
    files = {path.stem: read_json(path) for path in results.folder.iterdir()}
    assert {key_of(job) for job in jobs} == set(files) and len(files) == 454
    for name, stored in files.items():
        assert (
            key_of(Job(tuple(sorted(stored["options"].items()))))
            == name
            == results.name(Job(tuple(sorted(stored["options"].items()))))
        )
    digest = hashlib.blake2b("\n".join(sorted(files)).encode(), digest_size=8).hexdigest()
    assert digest == "df7f384f06a182ee", "the keys of runs that are stored must never change"


def test_results_lie_in_the_folder_of_an_edition():
    assert {path.name for path in RESULTS.iterdir()} <= set(edition_names())


def test_the_default_is_the_newest_edition_whose_runs_are_done():
    done = []
    for edition in map(load_edition, edition_names()):
        results = edition.results(RESULTS)
        jobs = [claim.jobs() for claim in edition.claims_with_values(results)]
        if all(jobs) and not results.missing([job for of_claim in jobs for job in of_claim]):
            done.append(edition.name)
    assert done[-1] == DEFAULT
    assert Reproduce().load_edition().name == DEFAULT and Reproduce(edition="first").load_edition().name == "first"


def test_an_edition_that_does_not_exist_is_refused(capsys):
    assert edition_names()[0] == "first"
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "--edition", "fourth", "--budget", "0"])
    assert stop.value.code == 2
    error = f"equipoise: error: --edition must be one of {', '.join(edition_names())}: got 'fourth'."
    assert capsys.readouterr().err.replace("\n", " ").strip() == error
    with pytest.raises(UsageError, match="got 'frist'. Did you mean first"):
        load_edition("frist")


def test_a_result_of_one_edition_is_none_of_another(two, tmp_path):
    first, second = two
    _fill(first, first.results(tmp_path / "r"), -0.1)
    job = first.claims["1-scope"].with_values(first.chosen(first.results(tmp_path / "r"))).jobs()[0]
    assert first.results(tmp_path / "r").get(job) is not None and second.results(tmp_path / "r").get(job) is None
    (of_first, _) = reproduce(Reproduce("1-scope", "first", budget=0, results=tmp_path / "r"), Quiet())
    (of_second, _) = reproduce(Reproduce("1-scope", "second", budget=0, results=tmp_path / "r"), Quiet())
    assert of_first.verdict == "supported" and of_second.is_missing
    assert [row["edition"] for row in as_json([of_first, of_second])] == ["first", "second"]


def test_runs_in_progress_of_editions_are_apart(two, tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(
        "equipoise_lab.reproduce.command.execute", lambda jobs, results, work, *a, **b: folders.append(work)
    )
    for name in ("first", "second"):
        reproduce(Reproduce("1-scope", name, out=tmp_path / "work", results=tmp_path / "r"), Quiet())
    assert set(folders) == {tmp_path / "work" / "first", tmp_path / "work" / "second"}


def test_a_family_of_verdicts_and_a_page_are_of_one_edition(two, tmp_path):
    first, second = two
    results = first.results(tmp_path / "r")
    _fill(first, results, -0.1)
    claims = first.claims_with_values(results)
    mixed = [*claims, *second.claims_with_values(results)]
    with pytest.raises(EquipoiseError, match="must be of one edition: got first, second"):
        findings(mixed, results)
    (alone, _) = findings(claims, results)
    assert alone.judgement.p_adjusted == alone.judgement.p, "the claims of the other edition must not count"
    with pytest.raises(EquipoiseError, match="must be of one edition: got first, second"):
        pages("p.md", second, claims, [alone], results)


def test_results_outside_the_folder_of_an_edition_are_named(two, tmp_path):
    first, _ = two
    results = Results(tmp_path / "r")
    _store(results, first.frontiers["none"].jobs(results)[0])
    progress = Quiet()
    reproduce(Reproduce("1-scope", "first", budget=0, results=tmp_path / "r"), progress)
    assert progress.lines[-1].startswith(f"1 results in {tmp_path / 'r'} are ignored: those of the first edition are")


def test_results_of_another_recipe_stay_and_are_ignored(two, tmp_path):
    old, _ = two
    _fill(old, old.results(tmp_path / "r"), -0.1)
    number = len([*(tmp_path / "r" / "first").iterdir()])
    job = old.frontiers["none"].jobs(old.results(tmp_path / "r"))[0]
    before = old.results(tmp_path / "r").get(job)
    new = replace(old, recipe=2)
    results = new.results(tmp_path / "r")
    assert results.get(job) is None and results.num_results_of_other_recipes == number
    _store(results, job, 7.0)
    assert results.get(job)["result"]["val_nats"] == 7.0 and results.num_results_of_other_recipes == number
    assert (
        old.results(tmp_path / "r").get(job) == before and old.results(tmp_path / "r").num_results_of_other_recipes == 1
    )
    sentence = (
        f"{number} stored results are ignored: of another version of the recipe than 2, that of the first edition."
    )
    text = pages("p.md", new, new.claims_with_values(results), [], results)["p_runs.md"]
    assert f"\n{sentence}\n" in text
    text = pages("p.md", old, old.claims_with_values(results), [], old.results(tmp_path / "r"))["p_runs.md"]
    assert "\n1 stored result is ignored: of another version of the recipe than 1, that of the first edition.\n" in text


def test_the_command_says_how_many_results_are_of_another_recipe(two, tmp_path):
    first, _ = two
    results = replace(first, recipe=2).results(tmp_path / "r")
    for job in first.frontiers["none"].jobs(results):
        _store(results, job)
    progress = Quiet()
    reproduce(Reproduce("1-scope", "first", budget=0, results=tmp_path / "r"), progress)
    assert progress.lines == [
        "2 stored results are ignored: of another version of the recipe than 1, that of the first edition."
    ]


def test_a_result_whose_recipe_is_not_that_of_its_name_is_refused(two, tmp_path):
    first, _ = two
    results = first.results(tmp_path / "r")
    job = first.frontiers["none"].jobs(results)[0]
    _store(results, job, recipe=2)
    with pytest.raises(EquipoiseError, match="of the recipe that its name stands for: it holds another. Remove it"):
        results.get(job)


ARM = 'strategy = "lbl:scope=micro_batch,coefficient={micro}"'


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("sizes.toml", "recipe = 1", "", "must have a recipe, a whole number from 1: got None"),
        ("sizes.toml", "recipe = 1", "recipe = 0", "must have a recipe, a whole number from 1: got 0"),
        ("sizes.toml", "[small]", "[tiny]", "frontiers: size must be one of tiny, standard: got 'small'"),
        ("frontiers.toml", "most_widenings = 3", "", "common must have size, seeds, .*: got size, seeds, most_maxvio"),
        ("frontiers.toml", 'strategy = "quantile"', 'name = "q"', "frontier quantile: a frontier must have a strategy"),
        ("sizes.toml", "[small]", "[small", "sizes.toml must be TOML: .* Restore the file"),
        ("page.toml", 'leaderboard = "8-leaderboard"', "", "lacks these keys, or has them and must not: leaderboard"),
        ("page.toml", 'leaderboard = "8', 'color = "red"\nleaderboard = "8', "or has them and must not: color"),
        ("page.toml", '"1-", ', "", "a claim must belong to one of the parts .*: 1-scope belongs to none"),
        ("page.toml", '"4-", ', '"1-", ', "one of the parts .*: 1-scope belongs to scope, mechanisms"),
        (
            "claims/1-scope.toml",
            ARM,
            'strategy = "lbl:coefficient={mikro}"',
            "arm micro must take .*no such frontier, only",
        ),
        ("claims/1-scope.toml", ARM, 'frontier = "mikro"', "it takes all of mikro, but there is no such frontier"),
        ("claims/1-scope.toml", ARM, 'strategy = "lbl:coefficient={none}"', "takes value of none, but it has no coeff"),
        (
            "claims/1-scope.toml",
            ARM,
            f'{ARM}\nlearning_rate = "{{micro.learning_rate}}"',
            "takes learning rate of micro, but it chooses no learning rate: list it in learning_rates",
        ),
        ("claims/1-scope.toml", "seeds = 8", "seeds = 8\nfirst_seed = 95", "micro was chosen with 100, 101"),
        ("claims/1-scope.toml", "seeds = 8", "seeds = [8, 16]\nfirst_seed = 90", "micro was chosen with 100, 101"),
    ],
)
def test_a_wrong_file_of_an_edition_is_refused(two, tmp_path, monkeypatch, file, old, new, message):
    monkeypatch.setattr(editions, "EDITIONS", tmp_path / "others")
    copy_of_first(tmp_path / "others" / "first")
    path = tmp_path / "others" / "first" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(EquipoiseError, match=message):
        load_edition("first")


def test_an_edition_of_an_unknown_name_is_refused(two, tmp_path):
    copy_of_first(tmp_path / "editions" / "frist")
    with pytest.raises(EquipoiseError, match="one of the names first, second, .*: .* has frist"):
        edition_names()


def test_a_folder_without_its_files_is_no_edition_and_a_missing_file_is_named(two, tmp_path):
    (tmp_path / "editions" / "third").mkdir()
    assert edition_names() == ["first", "second"]
    (tmp_path / "editions" / "third" / "sizes.toml").write_text("recipe = 1\n")
    with pytest.raises(EquipoiseError, match="third/frontiers.toml must be TOML: .*No such file"):
        load_edition("third")
