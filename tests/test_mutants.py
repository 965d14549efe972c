"""Every mutant fits the source and names tests that exist: one that does not would prove nothing."""

from collections import Counter

from mutants import MUTANTS
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
