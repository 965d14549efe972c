"""Every mutant fits the source and names tests that exist: one that does not would prove nothing."""

from collections import Counter

import pytest
from mutants import MUTANTS, random_sample
from mutants.mutant import ROOT, find_tests, source_files


def test_the_text_of_every_mutant_is_in_the_source_once():
    source = "\0".join(path.read_text(encoding="utf-8") for path in source_files())
    times = {mutant.what: source.count(mutant.original) for mutant in MUTANTS}
    assert {what: number for what, number in times.items() if number != 1} == {}


def test_every_mutant_names_one_test_file_or_folder():
    number = {tests: len(find_tests(tests)) for tests in {mutant.tests.split()[0] for mutant in MUTANTS}}
    assert {tests: found for tests, found in number.items() if found != 1} == {}
    options = {mutant.tests: mutant.tests.split()[1:] for mutant in MUTANTS}
    assert [tests for tests, words in options.items() if words and not words[0].startswith("-")] == []


def test_every_mutant_is_one_of_its_own():
    assert [what for what, times in Counter(mutant.what for mutant in MUTANTS).items() if times > 1] == []
    assert all(mutant.original != mutant.mutated for mutant in MUTANTS)


def test_the_mutants_are_those_of_this_repository():
    assert (ROOT / "pyproject.toml").is_file() and len(MUTANTS) > 300


def test_a_random_mutation_meets_the_tests_that_reach_its_line_and_else_those_of_its_file():
    coverage = {"lines": {"a.py": {"3": ["", "t::f"], "4": ["t::g"], "5": [""]}}, "ranks": ["t::ranks"]}
    tests = {
        line: random_sample.tests_of(random_sample.Mutation("a.py", line, "", 0), coverage) for line in (3, 4, 5, 6)
    }
    every = ["t::f", "t::g", "t::ranks"]
    assert tests == {3: ["t::f", "t::ranks"], 4: ["t::g"], 5: every, 6: every}


@pytest.mark.slow
def test_a_test_that_fails_is_named_and_a_hang_is_told_from_a_failure(tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): assert False\ndef test_c(): 1 / 0\n")
    (tmp_path / "test_hang.py").write_text("import threading\ndef test_d(): threading.Event().wait()\n")
    names = [f"test_some.py::test_{letter}" for letter in "abc"]
    assert random_sample.run_tests(tmp_path, names, 60) == names[1:2]
    assert random_sample.run_tests(tmp_path, names, 60, stop=False) == names[1:]
    assert random_sample.run_tests(tmp_path, ["test_hang.py::test_d"], 3) is None
