"""The README's code runs, its commands exist, and its numbers come from the stored result."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import equipoise
from equipoise_lab.reproduce.claim import claim_names, load_claim
from equipoise_lab.reproduce.frontier import FRONTIERS
from equipoise_lab.reproduce.page import LIMITS
from equipoise_lab.reproduce.runs import Results
from equipoise_lab.reproduce.verdict import findings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    printed = [float(line) for line in capsys.readouterr().out.split()]
    assert len(printed) == 3
    assert all(0 <= value <= 3 for value in printed)


def test_the_fragments_that_do_not_run_here_are_python():
    """They need ranks, or data; ``tests/distributed`` and ``tests/integrations`` run the same calls."""
    fragments = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    assert len(fragments) == 3
    for code in fragments:
        compile(code, "README.md", "exec")


def test_every_file_it_names_is_there():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        path, _, section = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if section else ()
        assert not section or section in {heading.lower().replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("script", ["demo", "claims"])
def test_its_numbers_and_those_of_the_pages_are_those_of_the_stored_results(script):
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_it_says_of_a_slower_loss_free_is_what_the_results_say():
    assert "better\nthan a loss within sequences, and not told apart from the one over the global batch" in README
    assert "that arm is far better" in LIMITS
    results = Results(ROOT / "benchmarks" / "results" / "claims")
    chosen = {name: frontier.chosen(results) for name, frontier in FRONTIERS.items()}
    claims = [load_claim(name).with_values(chosen) for name in claim_names()]
    verdicts = {
        (finding.comparison.of, finding.comparison.against): finding.verdict
        for finding in findings(claims, results)
        if finding.comparison.of == "loss-free-slower" and finding.comparison.statistic == "val_nats"
    }
    assert verdicts == {
        ("loss-free-slower", "sequence"): "supported",
        ("loss-free-slower", "loss-free"): "supported",
        ("loss-free-slower", "global"): "undecided",
    }


def test_the_changelog_begins_with_this_version_or_what_is_unreleased():
    versions = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    is_development = ".dev" in equipoise.__version__
    assert versions[0] == ("Unreleased" if is_development else equipoise.__version__)
    assert f'version = "{equipoise.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 45
