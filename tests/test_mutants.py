"""The breaks of tests/mutants.py fit the source: one that does not would break nothing."""

from collections import Counter
from pathlib import Path

import mutants

SOURCE = Path(__file__).parent.parent / "src" / "equipoise"


def test_the_text_of_every_break_is_in_the_source_once():
    found = {mutant.what: (SOURCE / mutant.file).read_text().count(mutant.old) for mutant in mutants.MUTANTS}
    assert {what: times for what, times in found.items() if times != 1} == {}


def test_every_break_is_one_of_its_own():
    assert [what for what, times in Counter(mutant.what for mutant in mutants.MUTANTS).items() if times > 1] == []
    assert all(mutant.old != mutant.new for mutant in mutants.MUTANTS)
