"""The pages of claims show the figures, the runs behind them and their limits, and link to each other."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from claim_runs import ANY, CLAIM, FIRST, LEADERBOARD, Quiet, fill, page_text, store

from equipoise_lab.analysis import detectable_effect
from equipoise_lab.records import read_json, write_json
from equipoise_lab.reproduce.command import reproduce
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.jobs import key_of
from equipoise_lab.reproduce.page import figure_of, pages, write
from equipoise_lab.reproduce.results import Results
from equipoise_lab.reproduce.verdict import findings
from equipoise_lab.train.config import Train


def test_the_page_shows_the_figures_and_the_runs_behind_them(tmp_path):
    results = Results(tmp_path)
    fill(results, [-0.1, -0.11, -0.09, -0.1])
    text = page_text([CLAIM], findings([CLAIM], results), results)
    assert "loss, a − b: −0.1000 [−0.1130, −0.0870], 4 seeds" in text and "| supported |" in text
    assert "| x | small | 8 of 8 | 1 | 2026-01-02 |" in text and "| all | 2 CPU cores | torch 2 |" in text
    assert "| a | `--strategy none` |\n| b | `--strategy loss-free` |" in text
    spread = 0.01 * (2 / 3) ** 0.5  # of -0.1, -0.11, -0.09, -0.1
    (row,) = (line for line in text.splitlines() if line.startswith("| x | loss, a − b | 4 |"))
    cells = [float(cell.replace("−", "-")) for cell in row.strip("| ").split(" | ")[3:]]
    assert cells == [-0.1, pytest.approx(spread, abs=1e-4), pytest.approx(detectable_effect(spread, 4), abs=1e-4)]
    assert "- **Supported: 1 of 1.** [x](results_mechanisms.md#x).\n" in text
    assert "- **Not supported: 0 of 1.**\n- **Undecided: 0 of 1.**\n" in text
    frontiers = {job for frontier in FIRST.frontiers.values() for job in frontier.jobs(results)}
    total = 8 + len(frontiers)
    for job in CLAIM.jobs():
        seconds = 450.0 if job == CLAIM.jobs()[0] else 900.0
        write_json(tmp_path / f"{key_of(job)}.json", results.get(job) | {"seconds": seconds})
    still_open = replace(CLAIM, name="y", arms={"a": CLAIM.arms["a"], "b": {"strategy": "loss-free:rate={loss-free}"}})
    text = page_text([CLAIM, still_open], findings([CLAIM], results), results)
    total += 4  # of the arm without a rate yet; the other arm has its runs
    (line,) = (line for line in text.splitlines() if line.startswith("All claims and frontiers:"))
    assert f" 8 of {total} runs. Their steps took 1.9 hours of one core; 1.0 if " in line


def test_the_head_may_quote_the_difference_of_a_claim(tmp_path):
    results = Results(tmp_path)
    fill(results, [-0.1, -0.11, -0.09, -0.1])
    edition = replace(ANY, page=replace(ANY.page, head="# Head\n\nThe difference is {x}.\n"))
    text = pages("results.md", edition, [CLAIM], findings([CLAIM], results), results)["results.md"]
    assert "The difference is −0.1000 [−0.1130, −0.0870], 4 seeds." in text


def test_a_claim_may_have_a_figure_of_its_own(tmp_path):
    edition = replace(ANY, page=replace(ANY.page, claim_figures={"x": "docs/figures/x.png"}))
    results, figure = Results(tmp_path), Path("../../figures/claims.png")
    for drawn, has_runs, shown in ((figure, False, False), (figure, True, True), (None, True, False)):
        if has_runs:
            fill(results, [-0.1])
        text = pages("r.md", edition, [CLAIM], findings([CLAIM], results), results, drawn)["r_mechanisms.md"]
        assert ("![Claim x](../../figures/x.png)" in text) == shown


def test_the_page_states_the_size_of_the_runs():
    default = Train(out=Path("x"))
    tokens = default.sequences * default.sequence_length
    for words in (
        f"{default.layers} layers of width {default.width}, {default.experts} experts and a shared one, "
        f"{default.experts_per_token} experts per token.",
        f"{default.micro_batches} micro-batches of {tokens:,} tokens",
        f"small has {FIRST.sizes['small']['steps']} steps, standard {FIRST.sizes['standard']['steps']}.",
    ):
        assert words in FIRST.page.reading
    options = {"steps", "qk_norm", "checkpoint_every", "dtype"}
    assert all(set(size) == options for size in FIRST.sizes.values()), (
        "the page must state any other option that differs from its default"
    )
    assert {size["dtype"] for size in FIRST.sizes.values()} == {"bfloat16"}


def test_the_page_has_its_figure_if_the_file_exists(tmp_path):
    results, path = Results(tmp_path), tmp_path / "docs" / "evidence" / "edition" / "page.md"
    write(path, ANY, [CLAIM], [], results)
    assert "![" not in path.read_text()
    figure = path.parent / figure_of(FIRST)
    figure.parent.mkdir()
    figure.touch()
    write(path, ANY, [CLAIM], [], results)
    assert "(../../figures/claims_first.png)" in path.read_text()


def test_the_pages_link_to_each_other_whatever_the_name(tmp_path):
    reproduce(
        Reproduce(edition="first", budget=0, results=tmp_path / "results", page=tmp_path / "pages" / "my own.md"),
        Quiet(),
    )
    texts = {path.name: path.read_text() for path in (tmp_path / "pages").iterdir()}
    assert set(texts) == {"my own.md", "my own_scope.md", "my own_mechanisms.md", "my own_runs.md"}
    headings = {name: set(re.findall(r"^## (.+)$", text, re.MULTILINE)) for name, text in texts.items()}
    assert headings["my own_scope.md"] | headings["my own_mechanisms.md"] >= set(FIRST.claims)
    for name, text in texts.items():
        links = re.findall(r"\]\(([\w.%]*)#([\w-]+)\)", text)
        assert links
        for page, anchor in links:
            titles = {heading.lower().replace(" ", "-") for heading in headings[unquote(page) or name]}
            assert anchor in titles, f"{name} links to {page}#{anchor}"


def test_a_sentence_in_the_notes_of_several_claims_is_said_once(tmp_path):
    first, second = (
        replace(CLAIM, name=name, note=note)
        for name, note in (("4-a", "Eq. 2 differs. Both have `z`. See 4-b."), ("4-b", "Both have `z`."))
    )
    text = pages("results.md", ANY, [first, second, CLAIM], [], Results(tmp_path))["results_mechanisms.md"]
    a, b = (f"[{name}](results_mechanisms.md#{name})" for name in ("4-a", "4-b"))
    assert text.count("Both have `z`.") == 1 and f"- {a}, {b}: Both have `z`.\n" in text
    see = "See also [Notes for several claims](#notes-for-several-claims)."
    assert f"\nEq. 2 differs. See {b}. {see}\n" in text and f"\n{see}\n" in text
    assert "Notes for several" not in page_text([first, CLAIM], [], Results(tmp_path))


def test_runs_of_other_machines_are_told_apart(tmp_path):
    results, other = Results(tmp_path), replace(CLAIM, name="y", first_seed=4)
    for claim in (CLAIM, other):
        store(results, claim.job("a", claim.first_seed), 5.0)
    path = tmp_path / f"{key_of(other.job('a', 4))}.json"
    write_json(path, read_json(path) | {"hardware": "8 CPU cores"})
    text = page_text([CLAIM, other, replace(CLAIM, name="z", first_seed=8)], [], results)
    assert "| x | 2 CPU cores | torch 2 |\n| y | 8 CPU cores | torch 2 |\n" in text
    assert "| z | small | 0 of 8 | 0 | none |" in text


def test_the_index_of_the_evidence_has_the_verdicts_of_the_stored_results():
    root = Path(__file__).parents[3]
    results = Results(root / "benchmarks" / "results" / "claims" / "first")
    claims = FIRST.claims_with_values(results)
    primary = {finding.claim.name: finding for finding in findings(claims, results) if finding.is_primary}
    number = Counter(finding.verdict for finding in primary.values())
    index = " ".join((root / "docs" / "evidence" / "index.md").read_text(encoding="utf-8").split())
    runs = len([*results.folder.glob("*.json")])
    assert f"{len(primary)} claims were tested in {runs} runs" in index
    assert (
        f"{number['supported']} are supported, {number['not supported']} are not, and {number['undecided']} are"
        in index
    )
    scope, domains = (primary[name].estimate for name in ("1-scope", "2-specialisation"))
    low, high = scope.interval
    assert f"by {-scope.mean:.4f} nats ({-high:.4f} to {-low:.4f}, {scope.n} seeds)" in index
    low, high = domains.interval
    assert f"{domains.mean:.3f} bits more about the domain ({low:.3f} to {high:.3f}, {domains.n} seeds)" in index
    lost = [name for name, finding in primary.items() if finding.verdict == "not supported"]
    assert lost == ["4-loss-free-same-scope", "5-rules"], "the index says which claims did not hold"


def test_the_leaderboard_uses_the_seeds_that_all_arms_have(tmp_path):
    claim, results = replace(CLAIM, name=LEADERBOARD), Results(tmp_path)
    fill(results, [-0.1, -0.3])
    store(results, CLAIM.job("a", 2), 100.0)
    for job in claim.jobs():
        if (stored := results.get(job)) is not None:
            stored["result"] |= {"maxvio_global": 0.5, "domain_information_bits": 0.25}
            write_json(tmp_path / f"{key_of(job)}.json", stored)
    text = pages("results.md", ANY, [claim], findings([claim], results), results)["results.md"]
    rows = [line for line in text.splitlines() if line.startswith("| a |") or line.startswith("| b |")]
    assert rows == [
        "| a | `--strategy none` | 5.3000 | 0.500 | 0.250 |",
        "| b | `--strategy loss-free` | 5.5000 | 0.500 | 0.250 |",
    ]
    assert f"claim {LEADERBOARD} over the 2 seeds" in text and "Without results yet" not in text
    another = replace(claim, arms=claim.arms | {"c": {"strategy": "quantile"}})
    text = pages("results.md", ANY, [another], findings([another], results), results)["results.md"]
    assert "\nWithout results yet: c.\n" in text


def test_a_claim_without_all_its_seeds_is_counted_as_unfinished(tmp_path):
    results = Results(tmp_path)
    fill(results, [-0.1, -0.11, -0.09])
    text = page_text([CLAIM], findings([CLAIM], results), results)
    assert "- **Supported: 0 of 1.**" in text and "- **Unfinished: 1 of 1.** [x]" in text
    fill(results, [-0.1, -0.11, -0.09, -0.1])
    text = page_text([CLAIM], findings([CLAIM], results), results)
    assert "- **Supported: 1 of 1.** [x]" in text and "Unfinished" not in text
