"""Results name the commit and the machine that they were made with; a page says whether a claim's runs are alike."""

import re
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from claim_runs import ANY, Quiet

from equipoise.errors import EquipoiseError
from equipoise_lab.records import write_json
from equipoise_lab.reproduce import made_with as recorded
from equipoise_lab.reproduce.claim import parse_claim
from equipoise_lab.reproduce.command import reproduce
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.made_with import MadeWith, commit, cpu_name, remember
from equipoise_lab.reproduce.page import pages
from equipoise_lab.reproduce.page.environments import made_with_line
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.runs import execute
from equipoise_lab.reproduce.verdict import findings

CLAIM = parse_claim(
    "x",
    {
        "title": "t",
        "source": "s",
        "paper": "p",
        "size": "small",
        "seeds": 2,
        "arms": {"a": {"strategy": "none"}, "b": {"strategy": "loss-free"}},
        "primary": {"statistic": "val_nats", "of": "a", "against": "b", "claim": "lower"},
    },
    ANY.sizes,
    ANY.name,
)


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path):
    """The folder of the packages in a repository with one commit."""
    folder = tmp_path / "clone" / "src"
    for name in ("equipoise/__init__.py", "equipoise_lab/train/loop.py", "equipoise_lab/reproduce/page.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    _git(folder.parent, "init", "-q")
    _git(folder.parent, "add", ".")
    _git(folder.parent, "commit", "-qm", "one")
    return folder


def test_a_commit_is_the_last_that_changed_the_code_of_runs(source):
    first = _git(source, "rev-parse", "--short=12", "HEAD")
    assert commit(source) == first and len(first) == 12
    (source / "equipoise_lab/reproduce/page.toml").write_text("claims are no code of runs")
    (source.parent / "results.json").write_text("nor are results")
    assert commit(source) == first
    _git(source.parent, "add", ".")
    _git(source.parent, "commit", "-qm", "two")
    assert commit(source) == first
    (source / "equipoise_lab/train/loop.py").write_text("changed")
    changed = commit(source)
    assert re.fullmatch(rf"{first} \+ changes [0-9a-f]{{8}}", changed)
    (source / "equipoise_lab/train/loop.py").write_text("changed again")
    assert commit(source) != changed, "two states of the code have two names"
    _git(source.parent, "commit", "-qam", "three")
    third = commit(source)
    assert third == _git(source, "rev-parse", "--short=12", "HEAD") != first
    (source / "equipoise_lab/train/new.py").write_text("a file that git does not know")
    new = commit(source)
    assert new.startswith(f"{third} + changes ")
    (source / "equipoise_lab/train/new.py").write_text("the same file with other content")
    assert commit(source) != new


def test_without_a_repository_of_its_own_a_package_names_its_version(source, tmp_path, monkeypatch):
    installed = tmp_path / "clone" / "site-packages"  # in a repository of somebody else
    (installed / "equipoise").mkdir(parents=True)
    (installed / "equipoise" / "__init__.py").write_text("")
    assert commit(installed) == f"equipoise {version('equipoise')}"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert commit(source) == f"equipoise {version('equipoise')}, commit unknown"


def test_a_repository_without_a_commit_is_an_error(tmp_path):
    (tmp_path / "equipoise").mkdir()
    (tmp_path / "equipoise" / "__init__.py").write_text("")
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    with pytest.raises(EquipoiseError, match="git must say at which commit"):
        commit(tmp_path)


def test_a_cpu_has_the_name_of_its_model_and_its_numbers(tmp_path):
    file = tmp_path / "cpuinfo"
    assert cpu_name(file)  # without the file: what Python knows
    core = "cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\nstepping\t: 8\nflags\t\t: fpu"
    file.write_text(f"processor\t: 0\n{core}\n\nprocessor\t: 1\n{core}\n")
    assert cpu_name(file) == "Xeon (cpu family 6 model 143 stepping 8)"
    file.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert cpu_name(file) and "BogoMIPS" not in cpu_name(file)


def test_a_run_that_goes_on_names_what_all_its_parts_were_made_with(tmp_path, monkeypatch):
    now = MadeWith("c1", "x")
    monkeypatch.setattr(recorded, "made_with", lambda: now)
    file, folder = tmp_path / "made_with.json", tmp_path / "run"
    assert remember(file, folder) == now
    folder.mkdir()
    now = MadeWith("c2", "x")
    assert remember(file, folder) == now  # nothing to go on from: it begins anew
    (folder / "checkpoints" / "00000040").mkdir(parents=True)
    now = MadeWith("c3", "y")
    for _ in range(2):
        assert remember(file, folder) == MadeWith("c2, then c3", "x, then y")
    now = MadeWith("c2", "x")
    assert remember(file, folder) == MadeWith("c2, then c3, then c2", "x, then y, then x")
    (folder / "result.json").touch()
    now = MadeWith("c4", "z")
    assert remember(file, folder).commit == "c2, then c3, then c2"  # nothing of it is made now
    file.unlink()
    assert remember(file, folder) == MadeWith("not recorded", "not recorded")


def _start(command, stdout, stderr, env):
    folder = Path(command[command.index("--out") + 1])
    folder.mkdir(parents=True)
    versions = {"torch": "2.13"}
    config = {"format": 1, "began": "2026-01-02", "device": "cpu", "dtype": "bfloat16", "versions": versions}
    config |= {"threads": 2, "corpus_fingerprint": "0f"} if folder.parent.name == "two" else {}
    write_json(folder / "config.json", config)
    (folder / "steps.jsonl").write_text('{"step":1,"seconds":2.0}\n')
    write_json(folder / "result.json", {"val_nats": 5.0, "domains": {}})

    class Done:
        def wait(self):
            return 0

    return Done()


def _run(results, jobs, work):
    assert execute(jobs, results, work, Quiet(), workers=1, start=_start)
    assert not list(work.iterdir()), "nothing of a finished run stays in the folder of runs in progress"


def test_a_new_result_names_its_commit_machine_and_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "made_with", lambda: MadeWith("abc", "Xeon"))
    results = Results(tmp_path / "results", recipe=3)
    _run(results, CLAIM.jobs(), tmp_path / "work")
    stored = results.get(CLAIM.jobs()[0])
    assert {name: stored[name] for name in ("commit", "cpu", "threads", "recipe")} == {
        "commit": "abc",
        "cpu": "Xeon",
        "threads": 1,
        "recipe": 3,
    }
    text = "\n".join(pages("p.md", ANY, [CLAIM], findings([CLAIM], results), results).values())
    assert "\nAll runs of this claim: commit abc, CPU Xeon, 1 thread, torch 2.13.\n" in text


def test_a_new_result_names_its_text_and_the_threads_that_it_had(tmp_path):
    results = Results(tmp_path / "results")
    _run(results, CLAIM.jobs()[:1], tmp_path / "two")
    assert {name: results.get(CLAIM.jobs()[0])[name] for name in ("threads", "text")} == {"threads": 2, "text": "0f"}


def test_runs_of_several_commits_or_machines_are_named_with_their_arms(tmp_path, monkeypatch):
    results = Results(tmp_path / "results")
    assert made_with_line(CLAIM, results) == ""
    a0, b0, a1, b1 = CLAIM.jobs()
    for jobs, now in (([a0, b0, a1], MadeWith("abc", "Xeon")), ([b1], MadeWith("def + changes", "Xeon"))):
        monkeypatch.setattr(recorded, "made_with", lambda now=now: now)
        _run(results, jobs, tmp_path / "work")
    line = "**The runs of this claim are not alike:** commit abc (arms a, b), commit def + changes (arms b)."
    assert made_with_line(CLAIM, results) == line
    path = results.folder / f"{results.name(a1)}.json"
    for changes, difference in (
        ({"cpu": "Epyc"}, "CPU Xeon (arms a, b), CPU Epyc (arms a)"),
        ({"threads": 2}, "1 thread (arms a, b), 2 threads (arms a)"),
        ({"versions": {"torch": "2.14"}}, "torch 2.13 (arms a, b), torch 2.14 (arms a)"),
        ({"hardware": "2 CPU cores, one thread a run, cuda, bfloat16"}, "device cpu (arms a, b), device cuda (arms a)"),
    ):
        stored = results.get(a1)
        write_json(path, stored | changes)
        assert f"; {difference}." in made_with_line(CLAIM, results)
        write_json(path, stored)
    stored = results.get(a1)
    write_json(path, stored | {"text": "0f"})
    assert "text" not in made_with_line(CLAIM, results), "that of the other runs is not known"
    write_json(results.folder / f"{results.name(b0)}.json", results.get(b0) | {"text": "aa"})
    assert "not alike:** text 0f (arms a), text aa (arms b); commit" in made_with_line(CLAIM, results)
    write_json(path, stored)
    only_a = replace(CLAIM, seeds_of={"b": 1})  # the run of the other commit is not of this claim
    assert "All runs of this claim: commit abc, " in made_with_line(only_a, results)


SHIPPED = ANY.results(Path(__file__).parents[3] / "benchmarks" / "results" / "claims")


def test_the_command_says_which_runs_are_not_alike(tmp_path):
    results, quiet = ANY.results(tmp_path), Quiet()
    results.folder.mkdir()
    for frontier in ANY.frontiers.values():
        for job in frontier.jobs(SHIPPED):
            write_json(results.folder / f"{results.name(job)}.json", SHIPPED.get(job))
    claim = ANY.claims["1-scope"].with_values(ANY.chosen(SHIPPED))
    for arm, name in (("micro", "abc"), ("global", "def")):
        job = claim.job(arm, 0)
        write_json(results.folder / f"{results.name(job)}.json", SHIPPED.get(job) | {"commit": name})
    reproduce(Reproduce("1-scope", "first", budget=0, results=tmp_path), quiet)
    assert quiet.lines == ["the runs of 1-scope are not alike: commit abc (arms micro), commit def (arms global)"]


def test_the_first_edition_recorded_neither_commit_nor_cpu():
    for claim in ANY.claims_with_values(SHIPPED):
        line = made_with_line(claim, SHIPPED)
        assert line == "All runs of this claim: commit not recorded, CPU not recorded, 1 thread, torch 2.13.0+cpu."
