"""The README is short, its links resolve, and its numbers come from the stored results. Its code: test_pages.py."""

import re
import subprocess
import sys
from pathlib import Path

import grid
import pytest

import equipoise
from equipoise_lab.records import read_json
from equipoise_lab.reproduce.edition import load_edition
from equipoise_lab.reproduce.verdict import findings

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def test_it_fits_into_a_few_screens():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


def test_every_file_it_names_is_there():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        path, _, section = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if section else ()
        assert not section or section in {heading.lower().replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("script", ["demo", "claims"])
def test_the_pages_have_the_numbers_of_the_stored_results(script):
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _all_findings(name="first"):
    edition = load_edition(name)
    results = edition.results(RESULTS / "claims")
    return findings(edition.claims_with_values(results), results)


def test_its_numbers_are_those_of_the_stored_results():
    text = " ".join(README.split())
    cells = [cell for wrapper in ("none", "ddp", "fsdp") for cell in grid.cells(wrapper)]
    assert f"{len(cells)} ways to run a training step" in text
    assert f"within {grid.TOLERANCE:.0e}".replace("e-0", "e-") in text
    ratios = {row["strategy"]: row["ratio"] for row in read_json(RESULTS / "overhead.json")["steps"] if "ratio" in row}
    step = ratios["loss-free"]
    assert f"{step['median']:.3f} ({step['low']:.3f} to {step['high']:.3f})" in text
    assert f"over the global batch {ratios['lbl:scope=global_batch']['median']:.2f}." in text
    on_ranks = {row["strategy"]: row["ratio"][1] for row in read_json(RESULTS / "rank_costs.json")["step_time"]}
    assert f"they take {on_ranks['loss-free']:.3f} and {on_ranks['lbl']:.3f} of a step without equipoise" in text
    primary = {finding.claim.name: finding for finding in _all_findings() if finding.is_primary}
    scope, specialisation = (primary[name].estimate for name in ("1-scope", "2-specialisation"))
    low, high = scope.interval
    assert f"{-scope.mean:.4f} nats lower" in text and f"({-high:.4f} to {-low:.4f}, eight" in text
    assert f"tell {specialisation.mean:.2f} bits more" in text
    again = next(finding for finding in _all_findings("second") if finding.claim.name == "1-scope")
    low, high = again.estimate.interval
    assert f"it is {-again.estimate.mean:.4f} ({-high:.4f} to {-low:.4f}), {again.verdict} too" in text
    verdicts = [finding.verdict for finding in primary.values()]
    counts = (verdicts.count(verdict) for verdict in ("supported", "not supported", "undecided"))
    assert "Of the 16, {} are supported, {} are not, and {} are undecided:".format(*counts) in text
    assert f"{len(primary)} claims" in text and f"{len([*(RESULTS / 'claims' / 'first').glob('*.json')])} runs" in text


def test_what_the_limits_say_of_a_slower_loss_free_is_what_the_results_say():
    assert "that arm is far better" in load_edition("first").page.limits
    verdicts = {
        (finding.comparison.of, finding.comparison.against): finding.verdict
        for finding in _all_findings()
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
    assert f"version: {equipoise.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 48
